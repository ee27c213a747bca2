//! Opens a local file with FFmpeg's demuxers and hands out the packets of its first video stream.
//!
//! What a stranger's file may do is bounded here. The only protocol is `file`, and of the demuxers
//! only those on [`FORMATS`] run: those that read other files on behalf of a playlist (HLS, DASH,
//! concat, IMF, SDP), run scripts, open devices, or show text and still pictures as films are left
//! out. FFmpeg's log is turned off: what went wrong is said once, in the error.

use std::path::{Path, PathBuf};
use std::sync::Once;

use ffmpeg::format::context::Input;
use ffmpeg::format::stream::Disposition;
use ffmpeg::{Packet, Rational, codec, media, packet};
use ffmpeg_next as ffmpeg;

use crate::{Error, Result};

/// The demuxers that may run, by FFmpeg's names. A name that this FFmpeg lacks does no harm.
const FORMATS: &str = "3dostr,4xm,amv,anm,apng,asf,asf_o,av1,avi,avs,avs2,avs3,bethsoftvid,bfi,\
    bink,c93,cavsvideo,cdxl,cine,dirac,dnxhd,dsicin,dv,dxa,ea,ea_cdata,evc,film_cpk,filmstrip,flic,\
    flv,frm,gdv,gif,gxf,h261,h263,h264,hevc,hnm,idcin,iff,ifv,ipmovie,ipu,iv8,ivf,ivr,jv,kux,live_flv,\
    lmlm4,lvf,lxf,m4v,matroska,webm,mjpeg,mjpeg_2000,mlv,mm,mods,moflex,mov,mp4,m4a,3gp,3g2,mj2,mp3,\
    ac3,eac3,aiff,amr,au,caf,dts,w64,\
    flac,wav,aac,mpc,mpc8,wv,ape,mpeg,mpegts,mpegvideo,mtv,mv,mvi,mxf,mxg,nc,nsv,nut,nuv,obu,ogg,paf,\
    pmp,pva,r3d,rl2,rm,roq,rpl,sga,siff,smk,smush,sol,svs,swf,tak,thp,tmv,tta,ty,txd,vc1,vc1test,vidc,\
    viv,vivo,vmd,vvc,wc3movie,webp_anim,wsvqa,wtv,wve,xmv,yop,yuv4mpegpipe";

/// One open file and the video stream to read.
pub(super) struct Demuxer {
    input: Input,
    stream: usize,
    path: PathBuf,
    /// The codec of the video stream.
    pub(super) codec: codec::Id,
    /// Seconds per tick of the video stream.
    pub(super) time_base: Rational,
    /// Presentation time of the first shown frame in ticks, where the container tells.
    pub(super) start_time: Option<i64>,
    /// Average frame rate in frames a second; 0 where the file does not tell.
    pub(super) frame_rate: f64,
    /// The bytes of the stream's display matrix, where it has one.
    pub(super) display_matrix: Option<Vec<u8>>,
}

/// What [`Demuxer::next`] found.
pub(super) enum Next {
    /// A packet of the video stream.
    Packet(Packet),
    /// The end of the file.
    End,
    /// The file breaks off or is damaged here; nothing after it is read.
    Broken,
}

impl Demuxer {
    /// Opens `path` and picks its first video stream that is not a cover picture.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = check_file(path)?;
        start_ffmpeg();
        let mut options = ffmpeg::Dictionary::new();
        options.set("protocol_whitelist", "file");
        options.set("format_whitelist", FORMATS);
        // The prefix keeps a name like `concat:a|b` or `http://x` a plain file name.
        let input = ffmpeg::format::input_with_dictionary(&format!("file:{name}"), options)
            .map_err(|cause| cannot_open(path, cause))?;
        let index = pick_stream(&input, path)?;
        let stream = input.stream(index).ok_or_else(|| no_video(path))?;
        let (codec, time_base) = (stream.parameters().id(), stream.time_base());
        let start_time = Some(stream.start_time()).filter(|ticks| *ticks != i64::MIN);
        let frame_rate = frame_rate(&stream);
        let display_matrix = stream
            .side_data()
            .find(|data| data.kind() == packet::side_data::Type::DisplayMatrix)
            .map(|data| data.data().to_vec());
        Ok(Self {
            stream: index,
            path: path.to_path_buf(),
            codec,
            time_base,
            start_time,
            frame_rate,
            display_matrix,
            input,
        })
    }

    /// The file, as the caller named it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The container's short name.
    pub(super) fn container(&self) -> String {
        self.input.format().name().to_string()
    }

    /// What a decoder of the video stream needs to know.
    pub(super) fn parameters(&self) -> Result<codec::Parameters> {
        let stream = self.input.stream(self.stream);
        let stream = stream.ok_or_else(|| no_video(&self.path))?;
        Ok(stream.parameters())
    }

    /// Reads on to the next packet of the video stream.
    pub(super) fn next(&mut self) -> Next {
        loop {
            let mut packet = Packet::empty();
            match packet.read(&mut self.input) {
                Ok(()) if packet.stream() == self.stream => return Next::Packet(packet),
                Ok(()) => {}
                Err(ffmpeg::Error::Eof) => return Next::End,
                Err(ffmpeg::Error::Other { errno }) if errno == ffmpeg::error::EAGAIN => {}
                Err(_) => return Next::Broken,
            }
        }
    }

    /// Moves to a key packet at or before `ticks`; false where the container cannot.
    pub(super) fn seek(&mut self, ticks: i64) -> bool {
        let base = self.time_base;
        let scale = 1_000_000 * i128::from(base.numerator());
        let den = i128::from(base.denominator()).max(1);
        // Up, so that FFmpeg's way back to ticks does not end one tick too early.
        let micros = (i128::from(ticks) * scale).div_euclid(den)
            + i128::from((i128::from(ticks) * scale).rem_euclid(den) != 0);
        match i64::try_from(micros) {
            Ok(micros) => self.input.seek(micros, ..micros).is_ok(),
            Err(_) => false,
        }
    }
}

fn start_ffmpeg() {
    static START: Once = Once::new();
    START.call_once(|| {
        // Registers devices and the like on old versions; it cannot fail on those that this builds on.
        let _ = ffmpeg::init();
        ffmpeg::log::set_level(ffmpeg::log::Level::Quiet);
    });
}

/// Refuses what is not a regular, non-empty file, before FFmpeg sees it: a FIFO would hang it.
fn check_file(path: &Path) -> Result<&str> {
    let meta = std::fs::metadata(path).map_err(|cause| Error::io("open", path, &cause))?;
    let shown = path.display();
    if !meta.is_file() {
        return Err(Error::Media(format!(
            "cannot open {shown}: it is not a regular file"
        )));
    }
    if meta.len() == 0 {
        return Err(Error::Media(format!(
            "cannot open {shown}: the file is empty"
        )));
    }
    // The operating system decides whether we may read it, with its own words.
    std::fs::File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
    path.to_str().ok_or_else(|| {
        Error::Media(format!(
            "cannot open {shown}: its name is not valid UTF-8; rename the file"
        ))
    })
}

fn cannot_open(path: &Path, cause: ffmpeg::Error) -> Error {
    let shown = path.display();
    Error::Media(match cause {
        ffmpeg::Error::Other { errno } if errno == ffmpeg::error::EINVAL => format!(
            "cannot open {shown}: playlists, pictures and formats that refer to other files are not read as \
             videos; give the video file itself"
        ),
        ffmpeg::Error::Other { errno } if errno == ffmpeg::error::ENOMEM => {
            format!("cannot open {shown}: it asks for more memory than there is")
        }
        _ => format!(
            "cannot open {shown}: it is not a video file, or it is cut off or damaged before its first frame"
        ),
    })
}

fn pick_stream(input: &Input, path: &Path) -> Result<usize> {
    let shown = path.display();
    let picked = input.streams().find(|stream| {
        stream.parameters().medium() == media::Type::Video
            && !stream.disposition().contains(Disposition::ATTACHED_PIC)
    });
    if let Some(stream) = picked {
        return Ok(stream.index());
    }
    let audio = input
        .streams()
        .any(|stream| stream.parameters().medium() == media::Type::Audio);
    if audio {
        let message = format!("cannot use {shown}: it has sound but no video stream");
        return Err(Error::Media(message));
    }
    Err(no_video(path))
}

fn no_video(path: &Path) -> Error {
    Error::Media(format!(
        "cannot use {}: it has no video stream",
        path.display()
    ))
}

fn frame_rate(stream: &ffmpeg::Stream<'_>) -> f64 {
    [stream.avg_frame_rate(), stream.rate()]
        .into_iter()
        .find(|rate| rate.numerator() > 0 && rate.denominator() > 0)
        .map_or(0.0, f64::from)
}
