//! What `lnv bench` says.

use serde_json::json;

use super::{Limits, Measured, Stage};

/// Everything that was measured.
pub struct Report {
    /// Seconds from the files to a model that can run.
    pub load_s: f64,
    /// Seconds of decoding and preprocessing a video, where one was given.
    pub media_s: Option<f64>,
    /// What the machine can do.
    pub limits: Limits,
    /// The stages.
    pub measured: Measured,
    /// Most memory that the process had at once since loading began, where the system tells.
    pub peak_rss_bytes: Option<u64>,
}

impl Report {
    /// Seconds from nothing to the first token.
    fn first_token_s(&self) -> f64 {
        let m = &self.measured;
        self.load_s + self.media_s.unwrap_or(0.0) + m.vision.seconds + m.prefill.seconds
    }

    /// One object.
    pub fn json(&self) -> serde_json::Value {
        let (m, l) = (&self.measured, &self.limits);
        let mut json = json!({
            "dtype": m.formats.dtype.name(),
            "quantize": m.formats.quantization.as_ref().map(|q| q.name()),
            "load_s": self.load_s,
            "resident_bytes": m.resident_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "vision_s": m.vision.seconds,
            "prefill_s": m.prefill.seconds,
            "prefill_tokens": m.prefill_tokens,
            "decode_s": m.decode.seconds,
            "first_token_s": self.first_token_s(),
            "peak_type": l.peak_type,
            "peak_gflops": l.peak_gflops,
            "bandwidth_gbs": l.bandwidth_gbs,
            "vision_gflops": m.vision.rate(),
            "prefill_gflops": m.prefill.rate(),
            "decode_gbs": m.decode.rate(),
            "vision_share": m.vision.rate() / l.peak_gflops,
            "prefill_share": m.prefill.rate() / l.peak_gflops,
            "decode_share": m.decode.rate() / l.bandwidth_gbs,
        });
        if let Some(media_s) = self.media_s {
            json["media_s"] = json!(media_s);
        }
        if let Some(rows) = &m.rows {
            json["decode_batch"] = json!(rows.rows);
            json["decode_context"] = json!(rows.context);
            json["decode_batch_s"] = json!(rows.stage.seconds);
            json["decode_batch_tokens_s"] = json!(rows.rows as f64 / rows.stage.seconds);
            json["decode_batch_gbs"] = json!(rows.stage.rate());
            json["decode_batch_share"] = json!(rows.stage.rate() / l.bandwidth_gbs);
        }
        json
    }

    /// Lines for a person.
    pub fn text(&self, frames: usize) -> String {
        let (m, l) = (&self.measured, &self.limits);
        let compute = |name: &str, stage: &Stage, what: &str| {
            format!(
                "{name:<8} {:>9.3} s   {:>7.1} GFLOP/s  {:>5.1} % of the peak   {what}\n",
                stage.seconds,
                stage.rate(),
                100.0 * stage.rate() / l.peak_gflops
            )
        };
        let stream = |name: &str, stage: &Stage, what: &str| {
            format!(
                "{name:<8} {:>9.4} s   {:>7.1} GB/s     {:>5.1} % of the bandwidth   {what}\n",
                stage.seconds,
                stage.rate(),
                100.0 * stage.rate() / l.bandwidth_gbs,
            )
        };
        let mut text = format!(
            "limits   {:.1} GFLOP/s in {}, {:.1} GB/s read, {} threads\n",
            l.peak_gflops,
            l.peak_type,
            l.bandwidth_gbs,
            std::thread::available_parallelism().map_or(1, usize::from)
        );
        let format = match &m.formats.quantization {
            None => m.formats.dtype.name().to_owned(),
            Some(q) => format!("{} beside {}", q.name(), m.formats.dtype.name()),
        };
        let gb = |bytes: f64| bytes / 1e9;
        let peak = self.peak_rss_bytes.map_or(String::new(), |peak| {
            format!(", {:.2} GB of memory at most", gb(peak as f64))
        });
        text += &format!(
            "load     {:>9.3} s   {:>7.2} GB of weights in {format}{peak}\n",
            self.load_s,
            gb(m.resident_bytes as f64)
        );
        if let Some(media) = self.media_s {
            text += &format!("media    {media:>9.3} s   decoding and preprocessing, second time\n");
        }
        text += &compute("vision", &m.vision, &format!("{frames} frames"));
        let prompt = format!("{} tokens", m.prefill_tokens);
        text += &compute("prefill", &m.prefill, &prompt);
        let rate = format!("{:.1} tokens/s", 1.0 / m.decode.seconds);
        text += &stream("decode", &m.decode, &rate);
        if let Some(rows) = &m.rows {
            let what = format!(
                "{:.1} tokens/s in {} row(s) of {} tokens",
                rows.rows as f64 / rows.stage.seconds,
                rows.rows,
                rows.context
            );
            text += &stream("decode", &rows.stage, &what);
        }
        text += &format!(
            "first token after {:.2} s, loading included\n",
            self.first_token_s()
        );
        text
    }
}
