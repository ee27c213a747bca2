//! What `lnv bench` says.

use serde_json::json;

use super::requests::Requests;
use super::rows::{Beside, Rows};
use super::{Limits, Measured, Stage};
use crate::memory;

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
            "peak_gflops": l.peak.gflops,
            "peak_instruction": l.peak.instruction,
            "bandwidth_gbs": l.bandwidth_gbs,
            "largest_cache_bytes": memory::largest_cache(),
            "vision_gflops": m.vision.rate(),
            "prefill_gflops": m.prefill.rate(),
            "decode_gbs": m.decode.rate(),
            "vision_share": m.vision.rate() / l.peak.gflops,
            "prefill_share": m.prefill.rate() / l.peak.gflops,
            "decode_share": m.decode.rate() / l.bandwidth_gbs,
        });
        if let Some(media_s) = self.media_s {
            json["media_s"] = json!(media_s);
        }
        if let Some(rows) = m.rows.last() {
            json["decode_batch"] = json!(rows.rows);
            json["decode_context"] = json!(rows.context);
            json["decode_batch_s"] = json!(rows.stage.seconds);
            json["decode_batch_tokens_s"] = json!(rows.tokens_s());
            json["decode_batch_gbs"] = json!(rows.stage.rate());
            json["decode_batch_share"] = json!(rows.stage.rate() / l.bandwidth_gbs);
            let all = m.rows.iter().map(|rows| self.rows_json(rows));
            json["decode_rows"] = all.collect();
        }
        if let Some(r) = &m.requests {
            json["requests"] = json!({
                "requests": r.load.requests,
                "clips": r.load.clips,
                "new_tokens": r.load.new_tokens,
                "one_by_one_s": r.one_by_one_s,
                "together_s": r.together_s[0],
                "together_for_throughput_s": r.together_s[1],
                "first_token_s": r.first_s,
                "first_token_again_s": r.again_s,
                "token_s": r.token_s.0,
                "token_worst_s": r.token_s.1,
                "token_beside_s": r.beside_s.0,
                "token_beside_worst_s": r.beside_s.1,
            });
        }
        json
    }

    fn rows_json(&self, rows: &Rows) -> serde_json::Value {
        let mut json = json!({
            "rows": rows.rows,
            "context": rows.context,
            "seconds": rows.stage.seconds,
            "tokens_s": rows.tokens_s(),
            "gbs": rows.stage.rate(),
            "share": rows.stage.rate() / self.limits.bandwidth_gbs,
        });
        match rows.beside {
            None => {}
            Some(Beside::OneRow(times)) => json["times_one_row"] = json!(times),
            Some(Beside::Shorter(context, share)) => {
                json["shorter_context"] = json!(context);
                json["of_shorter_and_kv"] = json!(share);
            }
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
                100.0 * stage.rate() / l.peak.gflops
            )
        };
        let cache = memory::largest_cache().map_or(0.0, |bytes| bytes as f64);
        let stream = |name: &str, stage: &Stage, what: &str| {
            // A share of memory's bandwidth says nothing about what need not come from memory.
            let cached = match stage.needed < cache {
                true => " (a cache may hold all of it)",
                false => "",
            };
            format!(
                "{name:<8} {:>9.4} s   {:>7.1} GB/s     {:>5.1} % of the bandwidth   {what}{cached}\n",
                stage.seconds,
                stage.rate(),
                100.0 * stage.rate() / l.bandwidth_gbs,
            )
        };
        let mut text = format!(
            "limits   {:.1} GFLOP/s in {} ({}), {:.1} GB/s read, {} threads\n",
            l.peak.gflops,
            l.peak_type,
            l.peak.instruction,
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
        for rows in &m.rows {
            let mut what = format!(
                "{:.1} tokens/s in {} row(s) of {} tokens",
                rows.tokens_s(),
                rows.rows,
                rows.context
            );
            what += &match rows.beside {
                None => String::new(),
                Some(Beside::OneRow(times)) => format!(", {times:.2} times one row"),
                Some(Beside::Shorter(context, share)) => {
                    format!(", {share:.2} of the time at {context} and of reading what is more")
                }
            };
            text += &stream("decode", &rows.stage, &what);
        }
        if let Some(r) = &m.requests {
            text += &requests_text(r);
        }
        text += &format!(
            "first token after {:.2} s, loading included\n",
            self.first_token_s()
        );
        text
    }
}

fn requests_text(r: &Requests) -> String {
    let ms = |seconds: f64| 1e3 * seconds;
    let [latency, throughput] = r.together_s;
    format!(
        "requests {:>9.3} s   {} requests about {} clips at once, {} new tokens each; one after another \
         {:.3} s: {:.2} times as fast; by an engine that prefers throughput {:.3} s: {:.2} times\n\
         again    {:>9.3} s   first token of another question about a clip; of the first {:.3} s: {:.1} \
         times as soon\n\
         beside   {:>9.4} s   a token of 4 readers (worst {:.1} ms) while a long clip is read; alone {:.1} ms \
         (worst {:.1} ms): {:.2} times\n",
        latency,
        r.load.requests,
        r.load.clips,
        r.load.new_tokens,
        r.one_by_one_s,
        r.one_by_one_s / latency,
        throughput,
        r.one_by_one_s / throughput,
        r.again_s,
        r.first_s,
        r.first_s / r.again_s,
        r.beside_s.0,
        ms(r.beside_s.1),
        ms(r.token_s.0),
        ms(r.token_s.1),
        r.beside_s.0 / r.token_s.0,
    )
}
