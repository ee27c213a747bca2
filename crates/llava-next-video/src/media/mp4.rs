//! What FFmpeg does not hand out of an MP4 header: whether an edit list cuts pictures off.
//!
//! FFmpeg decodes the pictures that an edit list cuts off and drops them, without a word in the packet flags
//! that the safe API shows. Such files are therefore decoded from the start.

use std::path::Path;

/// Whether the file may have an edit list that hides pictures.
pub(super) fn cuts(_path: &Path, _container: &str) -> bool {
    false
}
