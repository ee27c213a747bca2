//! The vision tower: tiles of pixels to a hidden state for each patch (CLIP's or SigLIP's transformer).
//!
//! Only the layers that `vision_feature_layer` reaches are loaded and run: the default takes the last
//! but one, so CLIP's 24th layer costs nothing. The final LayerNorm feeds a pooled output that this
//! model never reads; it is not loaded. Pictures of another size than `image_size` are refused.

use lnv_kernels::{Buffer, Epilogue, Heads, Ops, PatchGeometry, Precision, Vector};

use super::fingerprint::Fingerprint;
use super::layers::{LayerNorm, Linear};
use super::loader::Loader;
use crate::config::{LlavaNextVideoConfig, SelectStrategy, VisionConfig};
use crate::error::{Error, Result};
use crate::media::ImageSize;
use crate::processor::inputs::Pixels;

/// Pictures that go through the tower together: enough rows to keep the kernels busy, few enough that
/// the activations of a long video do not grow with its length.
const PICTURES_PER_PASS: usize = 8;
/// The same on a GPU, which has more to keep busy.
const PICTURES_PER_GPU_PASS: usize = 32;

/// Pictures that should go through the tower together.
pub fn pictures_per_pass(ops: &Ops) -> usize {
    match ops.is_cuda() {
        true => PICTURES_PER_GPU_PASS,
        false => PICTURES_PER_PASS,
    }
}

/// The transformer, up to the last layer whose output is read.
pub struct VisionTower {
    config: VisionConfig,
    /// Of attention: that of the weights.
    precision: Precision,
    taken: Vec<usize>,
    strategy: SelectStrategy,
    patch_embedding: Linear,
    class_embedding: Option<Vector>,
    position_embedding: Vec<f32>,
    pre_layrnorm: Option<LayerNorm>,
    layers: Vec<EncoderLayer>,
}

struct EncoderLayer {
    layer_norm1: LayerNorm,
    qkv_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// Pictures on their way through the tower, which may be stopped and gone on with between layers.
pub struct TowerPass {
    n: usize,
    x: Buffer,
    scratch: Scratch,
    /// `[n * feature_tokens, feature_columns]`; complete when no layer is left.
    pub features: Buffer,
    layer: usize,
}

/// Activations of one pass, reused by every layer.
struct Scratch {
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    inner: Buffer,
}

impl VisionTower {
    /// Loads the tower of `config`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, config: &LlavaNextVideoConfig) -> Result<Self> {
        let vision = config.vision_config.clone();
        let taken = config.vision_feature_indices();
        let depth = taken.iter().copied().max().unwrap_or(0);
        let d = vision.hidden_size;
        let class = vision.has_class_token();
        let layers = (0..depth)
            .map(|i| EncoderLayer::load(loader, &vision, i))
            .collect::<Result<_>>()?;
        Ok(Self {
            patch_embedding: load_patch_embedding(loader, &vision)?,
            class_embedding: match class {
                true => Some(loader.vector("vision_tower.embeddings.class_embedding", d)?),
                false => None,
            },
            position_embedding: loader.rounded(
                "vision_tower.embeddings.position_embedding.weight",
                &[vision.tokens(), d],
            )?,
            pre_layrnorm: match class {
                // "layrnorm" is how every published file spells it.
                true => Some(LayerNorm::load(
                    loader,
                    "vision_tower.pre_layrnorm",
                    d,
                    vision.layer_norm_eps,
                )?),
                false => None,
            },
            layers,
            precision: loader.formats().vision_attention(),
            taken,
            strategy: config.vision_feature_select_strategy,
            config: vision,
        })
    }

    /// Tokens a picture keeps after selection.
    pub fn feature_tokens(&self) -> usize {
        self.config.tokens() - usize::from(self.drops_class_token())
    }

    /// Columns of a feature row.
    pub fn feature_columns(&self) -> usize {
        self.config.hidden_size * self.taken.len()
    }

    /// Bytes kept in memory.
    pub fn bytes(&self) -> usize {
        self.patch_embedding.bytes() + self.layers.iter().map(EncoderLayer::bytes).sum::<usize>()
    }

    /// Adds its weights and settings.
    pub(super) fn fingerprint(&self, to: &mut Fingerprint) {
        let Self {
            config,
            precision,
            taken,
            strategy,
            patch_embedding,
            class_embedding,
            position_embedding,
            pre_layrnorm,
            layers,
        } = self;
        to.setting(&(config, precision, taken, strategy, layers.len()));
        patch_embedding.fingerprint(to);
        to.vector(class_embedding.as_ref());
        to.values(position_embedding);
        to.setting(&pre_layrnorm.is_some());
        if let Some(norm) = pre_layrnorm {
            norm.fingerprint(to);
        }
        layers.iter().for_each(|layer| layer.fingerprint(to));
    }

    /// Layers that are run, and the arithmetic of one picture in floating-point operations.
    pub fn cost(&self) -> (usize, f64) {
        let (c, t) = (&self.config, self.config.tokens() as f64);
        let (d, f) = (c.hidden_size as f64, c.intermediate_size as f64);
        let patch = (c.num_channels * c.patch_size * c.patch_size) as f64;
        let layer = 2.0 * t * (4.0 * d * d + 2.0 * d * f) + 4.0 * t * t * d;
        (
            self.layers.len(),
            2.0 * t * patch * d + layer * self.layers.len() as f64,
        )
    }

    fn drops_class_token(&self) -> bool {
        self.strategy == SelectStrategy::Default
    }

    /// Refuses pictures of another size than the tower's.
    ///
    /// # Errors
    /// A picture is not `image_size` square.
    pub fn check(&self, pixels: &[&Pixels]) -> Result<()> {
        let side = self.config.image_size;
        match pixels
            .iter()
            .find(|stack| stack.size != ImageSize::square(side))
        {
            None => Ok(()),
            Some(stack) => Err(Error::Input(format!(
                "Input image size ({}*{}) doesn't match model ({side}*{side}): check the sizes \
                 in preprocessor_config.json",
                stack.size.height, stack.size.width
            ))),
        }
    }

    /// The selected features of every picture: `[count * feature_tokens, feature_columns]`.
    ///
    /// `done` is called with the number of pictures finished.
    ///
    /// # Errors
    /// A picture is not `image_size` square, or `done` asks to stop.
    pub fn forward(
        &self,
        ops: &Ops,
        pixels: &[&Pixels],
        done: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Buffer> {
        self.check(pixels)?;
        if pixels.iter().any(|p| p.data.len() != p.count * p.stride()) {
            return Err(Error::Input(
                "a video's frames are still being read: only the engine waits for them".into(),
            ));
        }
        let count: usize = pixels.iter().map(|stack| stack.count).sum();
        let tokens = self.feature_tokens();
        let mut features = ops.buffer(count * tokens, self.feature_columns());
        let mut first = 0;
        for pictures in passes(pixels, pictures_per_pass(ops)) {
            let mut pass = self.begin(ops, &pictures);
            while self.advance(ops, &mut pass) {}
            let rows = pictures.len() * tokens;
            let from: Vec<u32> = (0..rows as u32).collect();
            let to: Vec<u32> = (first * tokens..first * tokens + rows)
                .map(|row| row as u32)
                .collect();
            ops.copy_rows(&pass.features, &from, &mut features, &to);
            first += pictures.len();
            done(first)?;
        }
        Ok(features)
    }

    /// Begins a pass of pictures, `3 * image_size²` values each; at most [`pictures_per_pass`] should go
    /// together.
    pub fn begin(&self, ops: &Ops, pictures: &[&[f32]]) -> TowerPass {
        let n = pictures.len();
        let x = self.embed(ops, pictures);
        let rows = x.rows();
        let (d, f) = (self.config.hidden_size, self.config.intermediate_size);
        let mut pass = TowerPass {
            scratch: Scratch {
                normed: ops.scratch(rows, d),
                qkv: ops.scratch(rows, 3 * d),
                attended: ops.scratch(rows, d),
                inner: ops.scratch(rows, f),
            },
            features: ops.buffer(n * self.feature_tokens(), self.feature_columns()),
            layer: 0,
            x,
            n,
        };
        self.select(ops, &mut pass);
        pass
    }

    /// Runs one layer of a pass, if one is left; true where more are.
    pub fn advance(&self, ops: &Ops, pass: &mut TowerPass) -> bool {
        if let Some(layer) = self.layers.get(pass.layer) {
            let how = (&self.config, self.precision);
            layer.forward(ops, how, &mut pass.x, &mut pass.scratch);
            pass.layer += 1;
            self.select(ops, pass);
        }
        pass.layer < self.layers.len()
    }

    /// Patch, class and position embeddings, and CLIP's first LayerNorm: hidden state 0.
    fn embed(&self, ops: &Ops, pictures: &[&[f32]]) -> Buffer {
        let (c, n) = (&self.config, pictures.len());
        let geometry = PatchGeometry {
            channels: c.num_channels,
            height: c.image_size,
            width: c.image_size,
            patch: c.patch_size,
        };
        let per_tile = c.patches_per_side().pow(2);
        let mut patches = ops.scratch(n * per_tile, c.num_channels * c.patch_size * c.patch_size);
        ops.patchify(pictures, geometry, &mut patches);
        let mut embedded = ops.buffer(n * per_tile, c.hidden_size);
        self.patch_embedding
            .forward(ops, &patches, Epilogue::Store(None), &mut embedded);
        let tokens = c.tokens();
        let mut x = match &self.class_embedding {
            None => embedded,
            Some(class) => {
                let mut x = ops.buffer(n * tokens, c.hidden_size);
                let class_rows: Vec<u32> = (0..n).map(|i| (i * tokens) as u32).collect();
                ops.broadcast_row(class, &mut x, &class_rows);
                let from: Vec<u32> = (0..(n * per_tile) as u32).collect();
                let to: Vec<u32> = (0..n * per_tile)
                    .map(|i| (i / per_tile * tokens + 1 + i % per_tile) as u32)
                    .collect();
                ops.copy_rows(&embedded, &from, &mut x, &to);
                x
            }
        };
        let positions = ops.upload(tokens, c.hidden_size, &self.position_embedding);
        ops.add_rows(&mut x, &positions);
        match &self.pre_layrnorm {
            None => x,
            Some(norm) => {
                let mut normed = ops.buffer(x.rows(), c.hidden_size);
                norm.forward(ops, &x, &mut normed);
                normed
            }
        }
    }

    /// Copies the hidden state of the layers done into its columns of the features, wherever the list
    /// names it.
    fn select(&self, ops: &Ops, pass: &mut TowerPass) {
        let (tokens, kept, n) = (self.config.tokens(), self.feature_tokens(), pass.n);
        let skip = tokens - kept;
        let wanted: Vec<usize> = (0..self.taken.len())
            .filter(|slot| self.taken[*slot] == pass.layer)
            .collect();
        if wanted.is_empty() {
            return;
        }
        let from: Vec<u32> = (0..n * kept)
            .map(|i| (i / kept * tokens + skip + i % kept) as u32)
            .collect();
        let here: Vec<u32> = (0..(n * kept) as u32).collect();
        if self.taken.len() == 1 {
            ops.copy_rows(&pass.x, &from, &mut pass.features, &here);
            return;
        }
        // Several layers: gather the rows, then put them into their columns.
        let mut rows = ops.buffer(n * kept, self.config.hidden_size);
        ops.copy_rows(&pass.x, &from, &mut rows, &here);
        for slot in wanted {
            let column = slot * self.config.hidden_size;
            ops.copy_columns(&rows, &mut pass.features, column);
        }
    }
}

/// Groups the pictures of all stacks into passes.
fn passes<'a>(pixels: &[&'a Pixels], most: usize) -> Vec<Vec<&'a [f32]>> {
    let pictures: Vec<&[f32]> = pixels
        .iter()
        .flat_map(|stack| stack.data.chunks_exact(stack.stride()))
        .collect();
    pictures.chunks(most).map(<[&[f32]]>::to_vec).collect()
}

/// The convolution with kernel = stride is a matrix over flattened patches; its `[n, 3, p, p]` weight
/// lies in memory as that matrix already.
fn load_patch_embedding(loader: &Loader<'_>, vision: &VisionConfig) -> Result<Linear> {
    const NAME: &str = "vision_tower.embeddings.patch_embedding";
    let (d, p) = (vision.hidden_size, vision.patch_size);
    let shape = [d, vision.num_channels, p, p];
    let weight = loader.reshaped(&format!("{NAME}.weight"), &shape, None)?;
    let bias = match vision.has_class_token() {
        true => None,
        false => Some(loader.vector(&format!("{NAME}.bias"), d)?),
    };
    Ok(Linear::from_parts(weight, bias))
}

impl EncoderLayer {
    fn load(loader: &Loader<'_>, vision: &VisionConfig, i: usize) -> Result<Self> {
        let (d, f) = (vision.hidden_size, vision.intermediate_size);
        let name = |part: &str| format!("vision_tower.encoder.layers.{i}.{part}");
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|p| (name(&format!("self_attn.{p}")), d));
        let norm = |part: &str| LayerNorm::load(loader, &name(part), d, vision.layer_norm_eps);
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            qkv_proj: Linear::load_fused(loader, &qkv, d, true)?,
            out_proj: Linear::load(loader, &name("self_attn.out_proj"), d, d, true)?,
            layer_norm2: norm("layer_norm2")?,
            fc1: Linear::load(loader, &name("mlp.fc1"), f, d, true)?,
            fc2: Linear::load(loader, &name("mlp.fc2"), d, f, true)?,
        })
    }

    fn bytes(&self) -> usize {
        [&self.qkv_proj, &self.out_proj, &self.fc1, &self.fc2]
            .iter()
            .map(|l| l.bytes())
            .sum()
    }

    fn fingerprint(&self, to: &mut Fingerprint) {
        let Self {
            layer_norm1,
            qkv_proj,
            out_proj,
            layer_norm2,
            fc1,
            fc2,
        } = self;
        layer_norm1.fingerprint(to);
        qkv_proj.fingerprint(to);
        out_proj.fingerprint(to);
        layer_norm2.fingerprint(to);
        fc1.fingerprint(to);
        fc2.fingerprint(to);
    }

    fn forward(
        &self,
        ops: &Ops,
        (config, precision): (&VisionConfig, Precision),
        x: &mut Buffer,
        s: &mut Scratch,
    ) {
        let heads = Heads {
            heads: config.num_attention_heads,
            kv_heads: config.num_attention_heads,
            head_dim: config.head_dim(),
        };
        let scale = (config.head_dim() as f32).powf(-0.5);
        self.layer_norm1.forward(ops, x, &mut s.normed);
        self.qkv_proj
            .forward(ops, &s.normed, Epilogue::Store(None), &mut s.qkv);
        let (len, how) = (config.tokens(), (scale, precision));
        ops.full_attention(&s.qkv, len, heads, how, &mut s.attended);
        self.out_proj.forward(ops, &s.attended, Epilogue::Add, x);
        self.layer_norm2.forward(ops, x, &mut s.normed);
        self.fc1.forward(
            ops,
            &s.normed,
            Epilogue::Store(Some(config.hidden_act)),
            &mut s.inner,
        );
        self.fc2.forward(ops, &s.inner, Epilogue::Add, x);
    }
}
