//! Decoded frames to upright RGB, the same bytes as PyAV 18's `frame.to_ndarray(format="rgb24")`.
//!
//! PyAV hands the frame to swscale with plain `SWS_BILINEAR` and lets it follow the frame's tags:
//! matrix and range as tagged, BT.601 and limited where untagged. The crate's safe scaler cannot set
//! a matrix, so the same swscale is driven through a filter graph (`buffer`, `scale`, `buffersink`), built once
//! per kind of frame. Rotation and flips that the file asks for are applied to the RGB picture, as players
//! do and as Transformers 4.53.3 does not (docs/decisions/0004, row 26).
//!
//! Known differences with FFmpeg 5.1 to 7, whose swscale is older than PyAV 18's: where the height is odd (or, above 8
//! bits, the width) about 0.2 % of the values are off by up to 3 levels, from rounding; 4:4:0 and 4:1:0, which
//! cameras do not write, take the nearest chroma row.

use ffmpeg::color::{Range, Space};
use ffmpeg::format::Pixel;
use ffmpeg::util::chroma::Location;
use ffmpeg::util::frame::side_data;
use ffmpeg::{filter, frame};
use ffmpeg_next as ffmpeg;

use super::{Image, ImageSize};
use crate::{Error, Result};

/// Turns frames into RGB pictures.
pub(super) struct Converter {
    turn: Turn,
    graph: Option<(Kind, filter::Graph)>,
}

/// What a graph is built for.
#[derive(Clone, Copy, PartialEq)]
struct Kind {
    format: Pixel,
    width: u32,
    height: u32,
    space: Space,
    range: Range,
    chroma: Location,
    interlaced: bool,
}

impl Converter {
    /// A converter for a stream whose header asks for `turn`.
    pub(super) fn new(turn: Turn) -> Self {
        Self { turn, graph: None }
    }

    /// `frame` as RGB, upright.
    pub(super) fn convert(&mut self, mut frame: frame::Video) -> Result<Image> {
        let turn = frame
            .side_data(side_data::Type::DisplayMatrix)
            .and_then(|data| Turn::from_matrix(data.data()))
            .unwrap_or(self.turn);
        let kind = Kind {
            format: frame.format(),
            width: frame.width(),
            height: frame.height(),
            space: frame.color_space(),
            range: frame.color_range(),
            chroma: frame.chroma_location(),
            interlaced: frame.is_interlaced(),
        };
        // A new tag or size is a new graph; that happens once per stream in all but odd files.
        if self.graph.as_ref().is_none_or(|(built, _)| *built != kind) {
            self.graph = Some((kind, build(&kind)?));
        }
        let Some((_, graph)) = self.graph.as_mut() else {
            return Err(failed(&kind));
        };
        frame.set_pts(Some(0));
        let mut source = graph.get("in").ok_or_else(|| failed(&kind))?;
        source.source().add(&frame).map_err(|_| failed(&kind))?;
        let mut rgb = frame::Video::empty();
        let mut sink = graph.get("out").ok_or_else(|| failed(&kind))?;
        sink.sink().frame(&mut rgb).map_err(|_| failed(&kind))?;
        Ok(turn.apply(pack(&rgb)))
    }
}

fn failed(kind: &Kind) -> Error {
    Error::Media(format!(
        "cannot convert a {}x{} video frame in pixel format {:?} to RGB: re-encode the video in a common format",
        kind.width, kind.height, kind.format
    ))
}

fn build(kind: &Kind) -> Result<filter::Graph> {
    let fail = || failed(kind);
    let descriptor = kind.format.descriptor().ok_or_else(fail)?;
    let mut graph = filter::Graph::new();
    let add = |graph: &mut filter::Graph, filter: &str, name: &str, args: &str| {
        let found = filter::find(filter).ok_or_else(fail)?;
        graph
            .add(&found, name, args)
            .map(|_| ())
            .map_err(|_| fail())
    };
    let source = format!(
        "video_size={}x{}:pix_fmt={}:time_base=1/25:pixel_aspect=1/1",
        kind.width,
        kind.height,
        descriptor.name()
    );
    add(&mut graph, "buffer", "in", &source)?;
    add(&mut graph, "buffersink", "out", "")?;
    let spec = filters(kind, descriptor.log2_chroma_w(), descriptor.log2_chroma_h());
    graph
        .output("in", 0)
        .and_then(|parser| parser.input("out", 0))
        .and_then(|parser| parser.parse(&spec))
        .map_err(|_| fail())?;
    graph.validate().map_err(|_| fail())?;
    Ok(graph)
}

/// The filters between source and sink, for chroma that is `1 << across` by `1 << down` subsampled.
fn filters(kind: &Kind, across: u8, down: u8) -> String {
    let (x, y) = siting(kind.chroma);
    let (x, y) = (x * ((1 << across) - 1), y * ((1 << down) - 1));
    let (matrix, range) = (matrix(kind.space), range(kind));
    let plain = matches!(
        kind.format,
        Pixel::YUV420P | Pixel::YUVJ420P | Pixel::YUVA420P
    );
    // Like swscale 8, `scale` converts the two fields of an interlaced frame apart from each other.
    let (rows, fields) = if kind.interlaced { (4, -1) } else { (2, 0) };
    let direct = plain && kind.height.is_multiple_of(rows);
    if across == 1 && down == 1 && !direct {
        // Up to FFmpeg 7, swscale's general way to RGB takes the nearest chroma row, not the two around it as
        // FFmpeg 8 (and so PyAV 18) does. Bringing chroma to full height first, in 16 bits, gives FFmpeg
        // 8's values with every version.
        return format!(
            "scale=flags=bilinear:interl={fields}:in_color_matrix={matrix}:out_color_matrix={matrix}:in_range={range}:\
             out_range={range}:in_h_chr_pos={x}:out_h_chr_pos={x}:in_v_chr_pos={y},\
             format=pix_fmts=yuv422p16,\
             scale=flags=bilinear:in_color_matrix={matrix}:in_range={range}:in_h_chr_pos={x},\
             format=pix_fmts=rgb24"
        );
    }
    format!(
        "scale=flags=bilinear:interl={fields}:in_color_matrix={matrix}:in_range={range}:in_h_chr_pos={x}:in_v_chr_pos={y},\
         format=pix_fmts=rgb24"
    )
}

/// The name that `scale` has for a tagged matrix. What swscale does not know it treats as BT.601.
fn matrix(space: Space) -> &'static str {
    match space {
        Space::BT709 => "bt709",
        Space::FCC => "fcc",
        Space::SMPTE240M => "smpte240m",
        Space::BT2020NCL | Space::BT2020CL => "bt2020",
        _ => "bt601",
    }
}

/// Where a chroma sample lies within the luma samples that it covers, in 256ths of a luma sample for a
/// subsampling of two. It matters where swscale interpolates chroma: more than 8 bits, unusual subsampling.
fn siting(chroma: Location) -> (u32, u32) {
    match chroma {
        Location::Left => (0, 128),
        Location::TopLeft => (0, 0),
        Location::Top => (128, 0),
        Location::BottomLeft => (0, 256),
        Location::Bottom => (128, 256),
        Location::Center | Location::Unspecified => (128, 128),
    }
}

fn range(kind: &Kind) -> &'static str {
    let full_by_name = matches!(
        kind.format,
        Pixel::YUVJ420P | Pixel::YUVJ422P | Pixel::YUVJ440P | Pixel::YUVJ444P | Pixel::YUVJ411P
    );
    match kind.range {
        _ if full_by_name => "full",
        Range::JPEG => "full",
        _ => "limited",
    }
}

/// Copies the rows without the padding behind them.
fn pack(rgb: &frame::Video) -> Image {
    let size = ImageSize::new(rgb.height() as usize, rgb.width() as usize);
    let (row, stride) = (size.width * 3, rgb.stride(0));
    let source = rgb.data(0);
    let mut data = Vec::with_capacity(size.height * row);
    for y in 0..size.height {
        data.extend_from_slice(&source[y * stride..y * stride + row]);
    }
    Image { size, data }
}

/// One of the eight ways to lay a rectangle on its grid: transpose first, then mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Turn {
    /// Swap rows and columns.
    pub(super) transpose: bool,
    /// Then mirror left to right.
    pub(super) mirror: bool,
    /// Then turn upside down.
    pub(super) flip: bool,
}

impl Turn {
    /// The turn that a display matrix (nine 32-bit numbers, native order) asks for; `None` for one
    /// that is not made of quarter turns and mirrors.
    pub(super) fn from_matrix(bytes: &[u8]) -> Option<Self> {
        let at = |i: usize| -> Option<f64> {
            let number = bytes.get(i * 4..i * 4 + 4)?;
            Some(f64::from(i32::from_ne_bytes(number.try_into().ok()?)))
        };
        // (x, y) of the picture is shown at (a x + c y, b x + d y).
        let (a, b, c, d) = (at(0)?, at(1)?, at(3)?, at(4)?);
        let unit = a.hypot(b).max(c.hypot(d));
        if unit == 0.0 {
            return None;
        }
        // A degree of slack, as FFmpeg's own player gives.
        let near = |x: f64| x.abs() < 0.02 * unit;
        if near(b) && near(c) && !near(a) && !near(d) {
            return Some(Self {
                transpose: false,
                mirror: a < 0.0,
                flip: d < 0.0,
            });
        }
        if near(a) && near(d) && !near(b) && !near(c) {
            return Some(Self {
                transpose: true,
                mirror: c < 0.0,
                flip: b < 0.0,
            });
        }
        None
    }

    /// EXIF orientation 1 to 8; anything else asks for nothing.
    pub(super) fn from_exif(orientation: u32) -> Self {
        let (transpose, mirror, flip) = match orientation {
            2 => (false, true, false),
            3 => (false, true, true),
            4 => (false, false, true),
            5 => (true, false, false),
            6 => (true, true, false),
            7 => (true, true, true),
            8 => (true, false, true),
            _ => (false, false, false),
        };
        Self {
            transpose,
            mirror,
            flip,
        }
    }

    /// Clockwise degrees, mirrors aside.
    pub(super) fn degrees(self) -> u32 {
        match (self.transpose, self.mirror, self.flip) {
            (false, true, true) => 180,
            (true, true, _) => 90,
            (true, false, true) => 270,
            (true, false, false) => 90,
            _ => 0,
        }
    }

    /// The size of a picture of `size` after the turn.
    pub(super) fn size(self, size: ImageSize) -> ImageSize {
        if self.transpose {
            ImageSize::new(size.width, size.height)
        } else {
            size
        }
    }

    /// Turns a picture.
    pub(super) fn apply(self, image: Image) -> Image {
        if self == Self::default() {
            return image;
        }
        let from = image.size;
        let to = self.size(from);
        let mut data = Vec::with_capacity(image.data.len());
        for y in 0..to.height {
            let y = if self.flip { to.height - 1 - y } else { y };
            for x in 0..to.width {
                let x = if self.mirror { to.width - 1 - x } else { x };
                let at = if self.transpose {
                    x * from.width + y
                } else {
                    y * from.width + x
                };
                data.extend_from_slice(&image.data[at * 3..at * 3 + 3]);
            }
        }
        Image { size: to, data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Image {
        // 1 2 3
        // 4 5 6
        let data = (1..=6u8).flat_map(|v| [v, v, v]).collect();
        Image {
            size: ImageSize::new(2, 3),
            data,
        }
    }

    fn turned(turn: Turn) -> Vec<u8> {
        turn.apply(picture())
            .data
            .iter()
            .step_by(3)
            .copied()
            .collect()
    }

    #[test]
    fn exif_orientations() {
        let expected = [
            vec![1, 2, 3, 4, 5, 6],
            vec![3, 2, 1, 6, 5, 4],
            vec![6, 5, 4, 3, 2, 1],
            vec![4, 5, 6, 1, 2, 3],
            vec![1, 4, 2, 5, 3, 6],
            vec![4, 1, 5, 2, 6, 3],
            vec![6, 3, 5, 2, 4, 1],
            vec![3, 6, 2, 5, 1, 4],
        ];
        for (i, pixels) in expected.iter().enumerate() {
            assert_eq!(
                &turned(Turn::from_exif(i as u32 + 1)),
                pixels,
                "orientation {}",
                i + 1
            );
        }
        assert_eq!(Turn::from_exif(0), Turn::default());
        assert_eq!(Turn::from_exif(9), Turn::default());
    }

    fn matrix(a: i32, b: i32, c: i32, d: i32) -> Vec<u8> {
        [a, b, 0, c, d, 0, 0, 0, 1 << 30]
            .iter()
            .flat_map(|v| v.to_ne_bytes())
            .collect()
    }

    #[test]
    fn display_matrices() {
        let one = 1 << 16;
        let turn = |a, b, c, d| Turn::from_matrix(&matrix(a, b, c, d));
        assert_eq!(turn(one, 0, 0, one), Some(Turn::default()));
        // A phone held upright: shown a quarter turn clockwise.
        assert_eq!(turn(0, one, -one, 0), Some(Turn::from_exif(6)));
        assert_eq!(turn(-one, 0, 0, -one), Some(Turn::from_exif(3)));
        assert_eq!(turn(0, -one, one, 0), Some(Turn::from_exif(8)));
        assert_eq!(turn(-one, 0, 0, one), Some(Turn::from_exif(2)));
        assert_eq!(turn(one / 2, one / 2, -one / 2, one / 2), None);
        assert_eq!(turn(0, 0, 0, 0), None);
        assert_eq!(Turn::from_matrix(&[1, 2]), None);
        assert_eq!(Turn::from_exif(6).degrees(), 90);
        assert_eq!(Turn::from_exif(8).degrees(), 270);
    }
}
