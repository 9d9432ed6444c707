//! Keys of rows, as numbers.

/// Keys are short, and lie where they are looked for, instead of behind a pointer each. Their bytes make numbers, with
/// zeros for what is missing: so they are sorted as the bytes are, and of two that differ in nothing else the shorter
/// one comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub words: [u64; WORDS],
    pub length: u8,
}

/// The longest key of a table: a moment or a name, and an id.
const WORDS: usize = 3;
const BYTES: usize = WORDS * size_of::<u64>();

impl Key {
    pub fn new(key: &[u8]) -> Self {
        let mut bytes = [0; BYTES];
        bytes[..key.len()].copy_from_slice(key);
        let (words, _) = bytes.as_chunks();
        let words = std::array::from_fn(|n| u64::from_be_bytes(words[n]));
        Self { words, length: u8::try_from(key.len()).expect("it fits into the bytes") }
    }

    /// The first key that begins with this word.
    pub const fn beginning_with(word: u64) -> Self {
        Self { words: [word, 0, 0], length: 0 }
    }

    pub fn with_bytes<R>(&self, see: impl FnOnce(&[u8]) -> R) -> R {
        see(&self.words.map(u64::to_be_bytes).as_flattened()[..usize::from(self.length)])
    }
}
