//! `lnv`.
fn main() {}
