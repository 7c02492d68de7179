//! The run folder: paths of a run's files, and its settings.

use std::path::{Path, PathBuf};

use super::checkpoint::BEST;
use super::records::RecordWriter;
use super::settings::{TrainSettings, drop_removed};
use crate::{Error, Result};
use ddtas_io::files;

const CONFIG: &str = "config.toml";

/// A folder that belongs to one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Checks that the folder in `settings` can become a run folder, without creating it.
    pub fn check(settings: &TrainSettings) -> Result<()> {
        match &settings.output {
            Some(path) if path.exists() => empty(path),
            _ => Ok(()),
        }
    }

    /// Creates the run folder: that of `--output`, which must be new or empty, or the next free number under
    /// runs/. Creates metrics.jsonl, whose lock reserves the folder for this run, then config.toml.
    pub fn create(settings: &TrainSettings, dataset: &str) -> Result<(Self, RecordWriter)> {
        let config = text_of(settings)?;
        let path = match &settings.output {
            Some(path) => {
                std::fs::create_dir_all(path).map_err(Error::io("create", path))?;
                empty(path)?;
                path.to_path_buf()
            }
            None => numbered(Path::new("runs"), dataset)?,
        };
        let folder = Self { path };
        let metrics = RecordWriter::create(&folder.metrics())?;
        files::write_atomic(&folder.config(), config.as_bytes()).inspect_err(|_| {
            // Best effort: without config.toml no run could go on from it, and it would keep new runs out.
            let _ = std::fs::remove_file(folder.metrics());
        })?;
        Ok((folder, metrics))
    }

    /// The folder `path`, without checks.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    /// Opens the folder of an earlier run, if it exists.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = Self::at(path);
        if path.exists() && !folder.config().exists() {
            return Err(Error::format(path, "not a run of ddtas-train: there is no config.toml in it"));
        }
        Ok(folder)
    }

    /// Removes partial files of a process that was killed while writing. The caller must hold the run's lock.
    pub fn remove_partial(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.path).map_err(Error::io("read", &self.path))?.flatten() {
            if files::is_partial(&entry.path()) {
                std::fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
            }
        }
        Ok(())
    }

    /// Reads the run's settings from config.toml.
    pub fn settings(&self) -> Result<TrainSettings> {
        let path = self.config();
        self.settings_in(&std::fs::read(&path).map_err(Error::io("read", &path))?)
    }

    /// Parses the run's settings from the bytes of config.toml.
    pub fn settings_in(&self, config: &[u8]) -> Result<TrainSettings> {
        let bad = |reason: String| Error::format(self.config(), reason);
        let text = str::from_utf8(config).map_err(|_| bad("is not UTF-8".into()))?;
        let mut given: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let before = config.get(..error.span().map_or(0, |span| span.start)).unwrap_or_default();
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            bad(format!("line {line}: {}", error.message()))
        })?;
        let settings: TrainSettings = given
            .clone()
            .try_into()
            .map_err(|error| bad(unreadable(&given).unwrap_or_else(|| error.message().to_owned())))?;
        drop_removed(&mut given);
        // serde ignores unknown keys here, since `deny_unknown_fields` does not work with flattened structs.
        let known = toml::Table::try_from(&settings).unwrap_or_default();
        match unknown(&given, &known) {
            Some(key) => Err(Error::format(self.config(), format!("{key} is not a setting: remove it"))),
            None => Ok(settings),
        }
    }

    /// Replaces config.toml.
    pub fn write_config(&self, settings: &TrainSettings) -> Result<()> {
        Ok(files::write_atomic(&self.config(), text_of(settings)?.as_bytes())?)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// Path of the weights of the best evaluation.
    pub fn best(&self) -> PathBuf {
        self.path.join(BEST)
    }

    /// Path of the checkpoint to resume from.
    pub fn last(&self) -> PathBuf {
        self.path.join("last.safetensors")
    }

    /// Path of the file with the seconds so far, separate so that checkpoints have the same bytes in every run.
    pub fn seconds(&self) -> PathBuf {
        self.path.join("seconds.txt")
    }

    /// Seconds of training, and in all, up to the last checkpoint; 0 if unknown.
    pub fn read_seconds(&self) -> [f64; 2] {
        let text = std::fs::read_to_string(self.seconds()).unwrap_or_default();
        let known = |seconds: &f64| *seconds >= 0.0 && seconds.is_finite();
        let mut numbers = text.split_whitespace().map(|word| word.parse().ok().filter(known).unwrap_or(0.0));
        let training = numbers.next().unwrap_or(0.0);
        [training, numbers.next().unwrap_or(training)]
    }

    /// Stores the seconds of training, and in all, up to a checkpoint.
    pub fn write_seconds(&self, [training, all]: [f64; 2]) -> Result<()> {
        Ok(files::write_atomic(&self.seconds(), format!("{training:.3} {all:.3}\n").as_bytes())?)
    }
}

/// The first key of `given`, or of a table in it, that is not in `known`.
fn unknown(given: &toml::Table, known: &toml::Table) -> Option<String> {
    given.iter().find_map(|(key, value)| match (value, known.get(key)) {
        (_, None) => Some(key.clone()),
        (toml::Value::Table(given), Some(toml::Value::Table(known))) => {
            unknown(given, known).map(|inner| format!("{key}.{inner}"))
        }
        _ => None,
    })
}

/// The first setting whose value cannot be read, and why: TOML's reader does not name it where structs are flattened. It is the
/// one that makes the default settings unreadable.
fn unreadable(given: &toml::Table) -> Option<String> {
    let defaults = toml::Table::try_from(TrainSettings::default()).ok()?;
    let with = |table: &toml::Table, key: &str, value: &toml::Value| {
        let mut table = table.clone();
        table.insert(key.to_owned(), value.clone());
        table
    };
    let refusal = |name: String, settings: toml::Table| {
        let error = settings.try_into::<TrainSettings>().err()?;
        Some(format!("{name}: {}", error.message()))
    };
    given.iter().find_map(|(key, value)| match (value, defaults.get(key)) {
        (toml::Value::Table(given), Some(toml::Value::Table(known))) => {
            given.iter().find_map(|(inner, value)| {
                refusal(format!("{key}.{inner}"), with(&defaults, key, &with(known, inner, value).into()))
            })
        }
        _ => refusal(key.clone(), with(&defaults, key, value)),
    })
}

/// Contents of config.toml, with absolute paths, since a run may be resumed from another working directory.
fn text_of(settings: &TrainSettings) -> Result<String> {
    let paths = [
        ("data-root", &settings.data.data_root),
        ("weights", &settings.weights),
        ("init", &settings.init),
        ("generator-init", &settings.generator.generator_init),
        ("output", &settings.output),
    ];
    for (name, path) in paths {
        if let Some(path) = path.as_ref().filter(|path| path.to_str().is_none()) {
            let reason = format!("is not UTF-8, which {CONFIG} cannot hold: give another path");
            return Err(Error::misuse(name, path.display(), reason));
        }
    }
    let config = toml::to_string(&settings.clone().with_absolute_paths()?)
        .map_err(|error| Error::Training(format!("{CONFIG} cannot hold the settings: {error}")))?;
    let remark = settings.random_start().map_or(String::new(), |line| format!("# {line}\n"));
    Ok(remark + &config)
}

/// An error unless `path` is an empty folder.
fn empty(path: &Path) -> Result<()> {
    if !path.is_dir() {
        return Err(Error::format(path, "is not a folder: give another --output"));
    }
    let mut entries = std::fs::read_dir(path).map_err(Error::io("read", path))?;
    if entries.next().is_some() {
        return Err(Error::format(
            path,
            "the run folder is not empty: give another --output, or go on with its run by --resume",
        ));
    }
    Ok(())
}

/// Creates a new folder `root/dataset-NUMBER`.
fn numbered(root: &Path, dataset: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
    for number in 1.. {
        let folder = root.join(format!("{dataset}-{number:03}"));
        // Creating is atomic: if two runs start at once, only one gets the number.
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::io("create", folder)(source)),
        }
    }
    unreachable!("the loop ends only by returning")
}
