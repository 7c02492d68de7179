//! Settings as command-line arguments, and paths in commands to copy.

use std::path::Path;

/// Name of an enum's value on the command line.
#[must_use]
pub fn name_of(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Settings without arguments.
pub(crate) fn defaults<T: clap::Args>() -> T {
    let matches = T::augment_args(clap::Command::new("settings")).get_matches_from(["settings"]);
    T::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// A path as a word of a POSIX shell's command line, in quotes only where it needs them.
#[must_use]
pub fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |letter: char| letter.is_alphanumeric() || "/._-+,:=@%".contains(letter);
    if !path.is_empty() && path.chars().all(is_plain) {
        return path;
    }
    // Between single quotes only a single quote has a meaning.
    format!("'{}'", path.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths_stay_as_they_are_and_others_are_quoted() {
        for plain in ["run", "/tmp/runs/cars-001/best.safetensors", "a_b+c,d:e=f@g%h", "Bögen/二"] {
            assert_eq!(quoted(Path::new(plain)), plain);
        }
        assert_eq!(quoted(Path::new("my run")), "'my run'");
        assert_eq!(quoted(Path::new("Ann's run")), r"'Ann'\''s run'");
        assert_eq!(quoted(Path::new("")), "''");
    }

    #[cfg(unix)]
    #[test]
    fn a_shell_reads_a_quoted_path_as_one_word() {
        for path in [
            "my run", "Ann's", "'", "$HOME", "~", "a;b", "a\\b", "`ls`", "a\nb", "*", "\"", "!!", "#1", "(x)",
        ] {
            let script = format!("printf %s. {}", quoted(Path::new(path)));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{path}."));
        }
    }
}
