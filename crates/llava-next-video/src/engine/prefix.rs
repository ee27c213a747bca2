//! Names for beginnings: what two prompts must have in common to share keys and values.
//!
//! Decision: a token is its id and, where it stands for a picture, the digest of that picture and the
//! place in it, since all pictures share their placeholder ids. A block of tokens is named by a BLAKE3
//! digest of its tokens and of the name of what stands before it, so that a name says everything that
//! its keys and values depend on. A digest of 256 bits, because one client must not be able to make a
//! picture that is taken for another's. Pictures may come late: names reach up to the first that is not there.

use std::sync::Arc;

use lnv_kernels::KV_BLOCK;

use crate::processor::inputs::{ImageInput, Pixels};

/// A name.
pub type Digest = [u8; 32];

/// The name of what stands before the first token: nothing.
pub const ROOT: Digest = [0; 32];

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenKey {
    id: u32,
    /// The picture and the place in it.
    picture: Option<(Digest, u32)>,
}

impl TokenKey {
    /// A token that stands for itself.
    pub fn text(id: u32) -> Self {
        Self { id, picture: None }
    }
}

/// The pictures of one row, in the order of their placeholders.
#[derive(Debug, Clone, Default)]
pub struct RowPictures {
    /// For each position of the prompt that stands for a picture: the picture's number among
    /// `digests` and the place in it.
    places: Vec<(u32, u32, u32)>,
    /// `None` for a picture that is not there yet.
    digests: Vec<Option<Digest>>,
    /// The first position that stands for such a picture.
    unknown: Option<u32>,
}

impl RowPictures {
    /// Adds a picture that stands at these positions, all behind those added before, or between.
    pub fn push(&mut self, digest: Option<Digest>, positions: &[u32]) {
        let number = self.digests.len() as u32;
        self.digests.push(digest);
        let places = positions.iter().enumerate();
        self.places
            .extend(places.map(|(place, at)| (*at, number, place as u32)));
    }

    /// To be called after the last [`RowPictures::push`].
    pub fn sort(&mut self) {
        self.places.sort_unstable();
        self.look_for_unknown(0);
    }

    /// The picture that stands at `position` is there.
    fn arrive(&mut self, position: u32, digest: Digest) {
        let found = self.places.binary_search_by_key(&position, |(at, ..)| *at);
        if let Ok(index) = found {
            self.digests[self.places[index].1 as usize] = Some(digest);
            self.look_for_unknown(self.unknown.unwrap_or(0));
        }
    }

    /// None before `from` is unknown.
    fn look_for_unknown(&mut self, from: u32) {
        let first = self.places.partition_point(|(at, ..)| *at < from);
        let mut places = self.places[first..].iter();
        let unknown = places.find(|(_, number, _)| self.digests[*number as usize].is_none());
        self.unknown = unknown.map(|(at, ..)| *at);
    }

    fn key(&self, position: usize, id: u32) -> TokenKey {
        let found = self
            .places
            .binary_search_by_key(&(position as u32), |(at, ..)| *at);
        let picture = found.ok().and_then(|index| {
            let (_, number, place) = self.places[index];
            Some((self.digests[number as usize]?, place))
        });
        TokenKey { id, picture }
    }
}

/// The names of a sequence's full blocks, as far as its ids go.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    names: Vec<Digest>,
    pictures: Arc<RowPictures>,
}

impl Chain {
    /// Of a prompt with these pictures.
    pub fn new(ids: &[u32], pictures: Arc<RowPictures>) -> Self {
        let mut chain = Self {
            names: Vec::new(),
            pictures,
        };
        chain.extend(ids);
        chain
    }

    /// The picture that stands at `position` of `ids` is there.
    pub fn arrive(&mut self, position: u32, digest: Digest, ids: &[u32]) {
        Arc::make_mut(&mut self.pictures).arrive(position, digest);
        self.extend(ids);
    }

    /// How many of `ids` are certain: those before the first picture that is not there.
    pub fn known(&self, ids: &[u32]) -> usize {
        let unknown = self.pictures.unknown.map(|at| at as usize);
        unknown.unwrap_or(usize::MAX).min(ids.len())
    }

    /// Names the blocks that have become full and are certain.
    pub fn extend(&mut self, ids: &[u32]) {
        let known = self.known(ids);
        while (self.names.len() + 1) * KV_BLOCK <= known {
            let block = self.names.len();
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.before(block));
            for key in self.keys(ids, block) {
                hasher.update(&key.id.to_le_bytes());
                if let Some((digest, place)) = key.picture {
                    hasher.update(&digest);
                    hasher.update(&place.to_le_bytes());
                }
            }
            self.names.push(*hasher.finalize().as_bytes());
        }
    }

    /// The name of everything before a block.
    pub fn before(&self, block: usize) -> Digest {
        match block {
            0 => ROOT,
            _ => self.names[block - 1],
        }
    }

    /// The name of everything up to a block's end, where the ids reach that far.
    pub fn name(&self, block: usize) -> Option<Digest> {
        self.names.get(block).copied()
    }

    /// The tokens of a block, as many as there are.
    pub fn keys(&self, ids: &[u32], block: usize) -> Vec<TokenKey> {
        let end = ids.len().min((block + 1) * KV_BLOCK);
        (block * KV_BLOCK..end)
            .map(|position| self.pictures.key(position, ids[position]))
            .collect()
    }
}

/// The digest of one picture out of a stack.
pub fn picture_digest(pixels: &Pixels, picture: usize) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"frame");
    hash_pixels(&mut hasher, pixels, picture..picture + 1);
    *hasher.finalize().as_bytes()
}

/// The digest of an image: its tiles, and how they are packed.
pub fn image_digest(image: &ImageInput) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"image");
    let layout = &image.layout;
    let window = layout.window;
    for number in [
        layout.grid.rows,
        layout.grid.cols,
        layout.patches_per_side,
        window.top,
        window.left,
        window.rows,
        window.cols,
    ] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    hash_pixels(&mut hasher, &image.tiles, 0..image.tiles.count);
    *hasher.finalize().as_bytes()
}

fn hash_pixels(hasher: &mut blake3::Hasher, pixels: &Pixels, pictures: std::ops::Range<usize>) {
    for number in [pixels.size.height as u64, pixels.size.width as u64] {
        hasher.update(&number.to_le_bytes());
    }
    let stride = pixels.stride();
    let data = &pixels.data[pictures.start * stride..pictures.end * stride];
    hasher.update(bytemuck::cast_slice(data));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(ids: &[u32], pictures: &[(u8, u32)]) -> Chain {
        let mut row = RowPictures::default();
        for (digest, at) in pictures {
            row.push(Some([*digest; 32]), &[*at, at + 1]);
        }
        row.sort();
        Chain::new(ids, Arc::new(row))
    }

    #[test]
    fn a_name_says_every_token_before_it() {
        let ids: Vec<u32> = (0..200).collect();
        let one = chain(&ids, &[]);
        assert_eq!(one.name(2).is_some(), one.name(3).is_none());
        let mut other = ids.clone();
        other[3] = 7;
        let two = chain(&other, &[]);
        assert!((0..3).all(|block| one.name(block) != two.name(block)));
        let mut grown = chain(&ids[..100], &[]);
        grown.extend(&ids);
        assert_eq!(grown.names, one.names);
    }

    #[test]
    fn names_reach_up_to_the_first_picture_that_is_not_there() {
        let ids = vec![9; 300];
        let whole = chain(&ids, &[(1, 70), (2, 200)]);
        let mut row = RowPictures::default();
        row.push(None, &[70, 71]);
        row.push(None, &[200, 201]);
        row.sort();
        let mut late = Chain::new(&ids, Arc::new(row));
        assert_eq!((late.known(&ids), late.names.len()), (70, 1));
        // The second comes first.
        late.arrive(200, [2; 32], &ids);
        assert_eq!((late.known(&ids), late.names.len()), (70, 1));
        late.arrive(70, [1; 32], &ids);
        assert_eq!((late.known(&ids), &late.names), (300, &whole.names));
        assert_eq!((whole.known(&ids), whole.known(&ids[..7])), (300, 7));
    }

    #[test]
    fn pictures_under_the_same_ids_are_told_apart() {
        let ids = vec![9; 128];
        let one = chain(&ids, &[(1, 70)]);
        let two = chain(&ids, &[(2, 70)]);
        let moved = chain(&ids, &[(1, 71)]);
        assert_eq!(one.name(0), two.name(0));
        assert_ne!(one.name(1), two.name(1));
        assert_ne!(one.name(1), moved.name(1));
        assert_ne!(one.keys(&ids, 1)[6], two.keys(&ids, 1)[6]);
        assert_eq!(one.keys(&ids, 1)[5], two.keys(&ids, 1)[5]);
    }
}
