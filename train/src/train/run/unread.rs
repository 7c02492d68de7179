//! Unreadable pictures: a warning names each once, and too many end the run.

use std::collections::BTreeSet;

use super::evaluation::Readable;
use super::event::Event;
use super::steps::Run;
use crate::data::{ImageBatch, Split};
use crate::ranks;
use crate::{Error, Result};

impl Run<'_> {
    /// Counts the unreadable pictures of a batch on all ranks, and warns of new ones.
    pub fn note_unread(&mut self, step: usize, batch: &ImageBatch, meta: Option<&ImageBatch>) -> Result<()> {
        let drawn = [(Some(batch), Some(&self.sampler)), (meta, self.meta_sampler.as_ref())];
        let mut missing = Vec::new();
        for (batch, sampler) in drawn {
            let (Some(batch), Some(sampler)) = (batch, sampler) else { continue };
            if batch.replaced > 0 {
                let wanted = sampler.batch(step as u64);
                missing.extend(wanted.iter().zip(&batch.indices).filter(|(a, b)| a != b).map(|(a, _)| *a));
            }
        }
        if self.ranks.size() > 1 {
            missing = ranks::gather(&*self.ranks, &missing)?;
        }
        self.state.replaced += missing.len();
        for index in missing.into_iter().collect::<BTreeSet<_>>() {
            if self.state.unread.train.insert(index) {
                self.warn_unread(&self.dataset.train, index, "another of its class replaces it")?;
            }
        }
        Ok(())
    }

    /// Warns of new unreadable pictures of test split and gallery, those not in `readable`.
    pub fn note_unread_in_test(&mut self, readable: &Readable) -> Result<()> {
        let dataset = self.dataset;
        for index in missing(&readable.queries, dataset.test.len()) {
            if self.state.unread.test.insert(index) {
                self.warn_unread(&dataset.test, index, "it is left out of the evaluation")?;
            }
        }
        if let (Some(split), Some(read)) = (&dataset.gallery, &readable.gallery) {
            for index in missing(read, split.len()) {
                if self.state.unread.gallery.insert(index) {
                    self.warn_unread(split, index, "it is left out of the gallery")?;
                }
            }
        }
        Ok(())
    }

    fn warn_unread(&mut self, split: &Split, index: usize, remedy: &str) -> Result<()> {
        // The split remembers the error of a picture that has failed before.
        let reason = split.picture(index).err().map_or_else(String::new, |error| error.to_string());
        let (unread, most) = (&self.state.unread, self.settings.max_bad_images);
        let count = unread.train.len() + unread.test.len() + unread.gallery.len();
        if count > most {
            return Err(Error::Dataset(format!(
                "{count} pictures cannot be read, more than --max-bad-images {most} allows; the last: {reason}"
            )));
        }
        (self.tell)(Event::Warning(&format!("{reason}; {remedy}")));
        Ok(())
    }
}

/// The indices below `count` that are not in `read`.
fn missing(read: &[usize], count: usize) -> Vec<usize> {
    if read.len() == count {
        return Vec::new();
    }
    let read: BTreeSet<usize> = read.iter().copied().collect();
    (0..count).filter(|index| !read.contains(index)).collect()
}
