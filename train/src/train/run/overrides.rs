//! Settings that may change when a run is resumed.

use crate::train::settings::TrainSettings;

/// A setting by its name in config.toml, and how it is copied.
type Changeable = (&'static str, fn(&mut TrainSettings, &TrainSettings));

/// All of them. The result depends only on `steps`, except that another device may round differently.
const CHANGEABLE: [Changeable; 6] = [
    ("device", |to, from| to.device.clone_from(&from.device)),
    ("workers", |to, from| to.workers = from.workers),
    ("checkpoint_every", |to, from| to.checkpoint_every = from.checkpoint_every),
    ("max_bad_images", |to, from| to.max_bad_images = from.max_bad_images),
    // The new path of the same pictures.
    ("data_root", |to, from| to.data.data_root.clone_from(&from.data.data_root)),
    // Of the whole run, at least as many as are done.
    ("steps", |to, from| to.steps = from.steps),
];

/// Changed settings of a run that is resumed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Overrides {
    settings: TrainSettings,
    /// Names of those that change.
    given: Vec<&'static str>,
}

impl Overrides {
    /// Names in config.toml of the settings that may change.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CHANGEABLE.iter().map(|(name, _)| *name)
    }

    /// Those of `settings` that may change and are `given`.
    pub fn new(settings: &TrainSettings, given: impl Fn(&str) -> bool) -> Self {
        Self { settings: settings.clone(), given: Self::names().filter(|name| given(name)).collect() }
    }

    /// Whether the setting changes.
    pub(super) fn has(&self, name: &str) -> bool {
        self.given.contains(&name)
    }

    /// Changes `settings`.
    pub(super) fn apply(&self, settings: &mut TrainSettings) {
        for (_, copy) in CHANGEABLE.iter().filter(|(name, _)| self.has(name)) {
            copy(settings, &self.settings);
        }
    }
}
