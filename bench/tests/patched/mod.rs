//! Changes bytes in files.
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use std::path::Path;

/// Replaces the bytes of a tensor of the .safetensors file `path`, from `at` on.
pub fn patch(path: &Path, tensor: &str, at: usize, bytes: &[u8]) {
    let mut file = std::fs::read(path).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let parsed: serde_json::Value = serde_json::from_slice(&file[8..header]).unwrap();
    let begin = header + parsed[tensor]["data_offsets"][0].as_u64().unwrap() as usize + at;
    file[begin..begin + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, file).unwrap();
}
