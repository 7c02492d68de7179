//! include/ddtas.h must equal what cbindgen generates from the source.

use std::path::Path;

/// Environment variable: if set, the header is written before it is compared.
const UPDATE: &str = "DDTAS_UPDATE_HEADER";

#[test]
fn the_committed_header_is_the_one_the_source_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/capi/types.rs"))
        .with_src(root.join("src/loss/scalars.rs"))
        .with_src(root.join("src/capi/context.rs"))
        .with_src(root.join("src/capi/mod.rs"));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    for entry in ["ddtas_loss(", "ddtas_gradient("] {
        let declared = made.lines().filter(|line| line.starts_with("enum") && line.contains(entry)).count();
        assert_eq!(declared, 1, "cbindgen has read {entry}...) once");
    }

    let path = root.join("include/ddtas.h");
    if std::env::var_os(UPDATE).is_some() {
        std::fs::create_dir_all(root.join("include")).unwrap();
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = committed.lines().zip(made.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or_else(|| committed.lines().count().min(made.lines().count())) + 1;
    assert!(
        committed == made,
        "line {line} of include/ddtas.h is out of date: {UPDATE}=1 cargo test --release --test header"
    );
}
