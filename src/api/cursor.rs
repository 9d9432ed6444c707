//! Cursors: where a page ended, as text that callers give back and need not understand.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use prost::Message;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// Tells one list from another: a cursor belongs to its filters.
pub type Filters = [u8; 8];

/// `list` names what is listed, `filters` is the request without its place in the list.
pub fn filters(list: &str, filters: &impl Message) -> Filters {
    let digest = Sha256::new().chain_update(list).chain_update(filters.encode_to_vec()).finalize();
    digest[..8].try_into().expect("8 of 32 bytes")
}

pub fn write(cursor: &impl Serialize) -> String {
    let bytes = postcard::to_stdvec(cursor).expect("a cursor is of known length");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// `None`: no cursor of ours.
pub fn read<C: DeserializeOwned>(text: &str) -> Option<C> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let (cursor, rest) = postcard::take_from_bytes(&bytes).ok()?;
    rest.is_empty().then_some(cursor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_was_and_nothing_else_does() {
        let cursor = ([1_u8; 8], 77_u32, Some(true));
        let text = write(&cursor);
        assert_eq!(read(&text), Some(cursor));
        for wrong in ["", "x", "!!", &text[1..], &format!("{text}AAAA")] {
            assert_eq!(read::<([u8; 8], u32, Option<bool>)>(wrong), None, "{wrong}");
        }
    }
}
