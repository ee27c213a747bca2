//! Pictures of one job on their way through the vision tower.
//!
//! Decision: one pass at a time, of the frames of one job or of tiles of one of its images; it can rest
//! between layers while others decode. It holds copies of its pixels and no reference to the job, so that
//! the job may vanish meanwhile.

use lnv_kernels::Buffer;

use super::RequestId;
use super::job::{Job, Source};
use super::prefix::Digest;
use crate::error::Result;
use crate::model::{LlavaNextVideoModel, TowerPass, numbers, pick, pictures_per_pass};
use crate::processor::inputs::ImageInput;

/// A pass, and what becomes of it.
pub(crate) struct Sight {
    /// Whose pictures they are.
    pub job: RequestId,
    pass: TowerPass,
    work: Work,
}

enum Work {
    Frames(Vec<Digest>),
    Tiles(Box<Tiles>),
}

/// An image, of which a pass takes some tiles.
struct Tiles {
    digest: Digest,
    image: ImageInput,
    /// Selected features of all tiles, as far as passes have come.
    selected: Buffer,
    /// Tiles done, and tiles of the present pass.
    done: usize,
    here: usize,
}

/// What a pass that is through gives.
pub(crate) enum Seen {
    /// Features by digest.
    Features(Vec<(Digest, Buffer)>),
    /// More tiles of the image are to be seen.
    More(Box<Sight>),
}

impl Sight {
    /// A pass of what `job` is to see next; `few` for as short a pass as possible, `stored` where features may be
    /// on disk instead.
    pub fn begin(
        model: &LlavaNextVideoModel,
        job: &Job,
        (few, stored): (bool, bool),
    ) -> Option<Sight> {
        let most = if few {
            1
        } else {
            pictures_per_pass(model.ops())
        };
        let first = job.to_encode(stored).next()?;
        let (tower, ops) = (model.vision_tower(), model.ops());
        if let Source::Image(image) = &first.source {
            let image = image.clone();
            let tokens = image.layout.tiles * tower.feature_tokens();
            let tiles = Box::new(Tiles {
                digest: first.digest,
                selected: ops.buffer(tokens, tower.feature_columns()),
                image,
                done: 0,
                here: 0,
            });
            return Some(Sight::tiles(model, job.id, tiles, most));
        }
        let (mut digests, mut pictures): (Vec<Digest>, Vec<&[f32]>) = (Vec::new(), Vec::new());
        for picture in job.to_encode(stored) {
            if let Source::Frame(pixels, index) = &picture.source
                && !digests.contains(&picture.digest)
            {
                let stride = pixels.stride();
                digests.push(picture.digest);
                pictures.push(&pixels.data[index * stride..(index + 1) * stride]);
            }
            if digests.len() == most {
                break;
            }
        }
        Some(Sight {
            job: job.id,
            pass: tower.begin(ops, &pictures),
            work: Work::Frames(digests),
        })
    }

    fn tiles(
        model: &LlavaNextVideoModel,
        job: RequestId,
        mut tiles: Box<Tiles>,
        most: usize,
    ) -> Sight {
        tiles.here = most.min(tiles.image.layout.tiles - tiles.done);
        let pixels = &tiles.image.tiles;
        let (stride, done) = (pixels.stride(), tiles.done);
        let pictures: Vec<&[f32]> = (done..done + tiles.here)
            .map(|tile| &pixels.data[tile * stride..(tile + 1) * stride])
            .collect();
        Sight {
            job,
            pass: model.vision_tower().begin(model.ops(), &pictures),
            work: Work::Tiles(tiles),
        }
    }

    /// Runs one layer; false where none is left.
    pub fn advance(&mut self, model: &LlavaNextVideoModel) -> bool {
        model.vision_tower().advance(model.ops(), &mut self.pass)
    }

    /// What a pass without layers left has seen.
    ///
    /// # Errors
    /// The tower's features are no whole frames.
    pub fn finish(self, model: &LlavaNextVideoModel, few: bool) -> Result<Seen> {
        match self.work {
            Work::Frames(digests) => {
                let features = model.project_frames(&self.pass.features)?;
                let rows = features.rows() / digests.len();
                let own = |(i, digest)| {
                    let rows = numbers(i * rows, rows);
                    (digest, pick(model.ops(), &features, &rows))
                };
                let all = digests.into_iter().enumerate().map(own).collect();
                Ok(Seen::Features(all))
            }
            Work::Tiles(mut tiles) => {
                let rows = model.vision_tower().feature_tokens();
                let from = numbers(0, tiles.here * rows);
                let to = numbers(tiles.done * rows, tiles.here * rows);
                model
                    .ops()
                    .copy_rows(&self.pass.features, &from, &mut tiles.selected, &to);
                tiles.done += tiles.here;
                if tiles.done < tiles.image.layout.tiles {
                    let most = if few {
                        1
                    } else {
                        pictures_per_pass(model.ops())
                    };
                    return Ok(Seen::More(Box::new(Sight::tiles(
                        model, self.job, tiles, most,
                    ))));
                }
                let features = model.project_image(&tiles.selected, &tiles.image);
                Ok(Seen::Features(vec![(tiles.digest, features)]))
            }
        }
    }
}
