//! The training loop with its evaluations and checkpoints.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::evaluation::{Test, TestRows};
use super::event::{Event, Outcome, Summary};
use super::files::Files;
use super::setup::{Batches, Setup, first_network, first_optimizer};
use super::state::{Best, RunState, steps_of};
use crate::data::{Dataset, ImageBatch, PkSampler};
use crate::generator::Lambda;
use crate::ranks::{self, Collective};
use crate::train::checkpoint;
use crate::train::device::RunDevice;
use crate::train::engine::Engine;
use crate::train::folder::RunFolder;
use crate::train::generator::Generator;
use crate::train::records::{EvaluationRecord, Phase, Record, StepRecord};
use crate::train::report::{self, Baseline, Findings};
use crate::train::schedule::ScheduleKind;
use crate::train::settings::TrainSettings;
use crate::train::shown::choose;
use crate::{Error, Result};
use ddtas::retrieval::{Metrics, Recall};
use ddtas_io::Error as Program;
use ddtas_io::console::counted;

/// Number of test pictures in the report, and of neighbours shown for each.
const QUERIES: usize = 10;
const NEIGHBOURS: usize = 8;

/// Spread of a batch's embeddings (at most 1) below which they have collapsed to one point.
const COLLAPSED: f64 = 1e-4;

/// A run in progress.
pub(super) struct Run<'a> {
    pub state: RunState,
    pub settings: &'a TrainSettings,
    pub dataset: &'a Dataset,
    /// The run's files; only on rank 0.
    files: Option<Files>,
    engine: Engine,
    pub sampler: PkSampler,
    pub meta_sampler: Option<PkSampler>,
    test: Test<'a>,
    pub ranks: Rc<dyn Collective>,
    /// Seconds of training so far, without evaluations.
    seconds: f64,
    /// Seconds of earlier processes in all.
    earlier: f64,
    begun: Instant,
    /// Whether the warning of a collapse was given.
    told_of_collapse: bool,
    stop: &'a AtomicBool,
    pub tell: &'a mut dyn FnMut(Event<'_>),
}

/// How a part of a run ended: completed, or stopped on request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Stopped,
}

impl<'a> Run<'a> {
    pub fn new(
        settings: &'a TrainSettings,
        dataset: &'a Dataset,
        files: Option<Files>,
        setup: Setup,
        ranks: &Rc<dyn Collective>,
        stop: &'a AtomicBool,
        tell: &'a mut dyn FnMut(Event<'_>),
    ) -> Self {
        let Setup { engine, sampler, meta_sampler } = setup;
        let preprocessing = settings.backbone.preprocessing();
        let ranks = Rc::clone(ranks);
        let test =
            Test { dataset, image_size: settings.image_size, preprocessing, stop, ranks: Rc::clone(&ranks) };
        let [seconds, earlier] = files.as_ref().map_or([0.0; 2], |files| files.folder.read_seconds());
        let state = RunState {
            extents: Some(dataset.extents()),
            data: Some(dataset.fingerprint()),
            settings: Some(super::state::fixed(settings).to_string()),
            ranks: Some(ranks.size()),
            ..RunState::default()
        };
        Self {
            state,
            settings,
            dataset,
            files,
            engine,
            sampler,
            meta_sampler,
            test,
            ranks,
            seconds,
            earlier,
            begun: Instant::now(),
            told_of_collapse: false,
            stop,
            tell,
        }
    }

    /// Trains from `state` to the end. `resumed` is the number of steps that an earlier process has done, if
    /// one began the run; `said` are messages to report once the run has started.
    pub fn train(
        mut self,
        device: &RunDevice,
        resumed: Option<usize>,
        begun: Instant,
        said: Vec<Event<'_>>,
    ) -> Result<Outcome> {
        self.begun = begun;
        self.announce(device, resumed);
        if self.files.is_some() {
            said.into_iter().for_each(|event| (self.tell)(event));
        }
        let ended = self.steps().and_then(|progress| match progress {
            Progress::Done => self.finish(),
            Progress::Stopped => {
                self.save()?;
                let stopped = |files: &Files| Outcome::Stopped {
                    command: self.ranks.to_resume(files.path()),
                    phase: self.phase(),
                    step: self.state.step,
                };
                Ok(self.files.as_ref().map_or(Outcome::OnRank0, stopped))
            }
        });
        ended.map_err(|error| match &self.files {
            Some(files) => {
                let best = self.state.best.as_ref().map(|best| best.step);
                cut_short(error, &*self.ranks, &files.folder, best)
            }
            None => error,
        })
    }

    fn announce(&mut self, device: &RunDevice, resumed: Option<usize>) {
        let Some(files) = &self.files else { return };
        let (phase, ranks) = (self.phase(), self.ranks.size());
        let name = device.spec.to_string();
        (self.tell)(Event::Computing { device: &name, reason: device.reason.as_deref(), ranks });
        (self.tell)(Event::Started {
            dataset: self.dataset,
            folder: files.path(),
            loss: self.settings.loss,
            steps_per_epoch: self.sampler.steps_per_epoch(),
            phase,
            steps: steps_of(phase, self.settings),
            resumed,
        });
        if resumed.is_none() {
            let random = self.settings.random_start();
            let warnings = self.dataset.warnings.iter().chain(&random);
            warnings.for_each(|warning| (self.tell)(Event::Warning(warning)));
        }
    }

    /// Whether any rank was told to stop.
    fn stopping(&self) -> Result<bool> {
        ranks::any(&*self.ranks, self.stop.load(Ordering::Relaxed))
    }

    fn steps(&mut self) -> Result<Progress> {
        self.engine.check_weights(self.state.step)?;
        if self.measure_pixels()? == Progress::Stopped {
            return Ok(Progress::Stopped);
        }
        if self.rehearse()? == Progress::Stopped {
            return Ok(Progress::Stopped);
        }
        self.run_steps(self.settings.steps)
    }

    /// Takes the steps of this part of the run, up to `last`, with evaluations unless it is the rehearsal.
    fn run_steps(&mut self, last: usize) -> Result<Progress> {
        // After a rehearsal lambda is fixed.
        let learns = self.phase() == Phase::Rehearsal || self.settings.generator.rehearsal_steps() == 0;
        let meta_sampler = self.meta_sampler.as_ref().filter(|_| learns);
        let (sampler, steps, ranks) = (&self.sampler, self.state.step..last, &*self.ranks);
        let mut batches = Batches::new(self.settings, self.dataset, sampler, meta_sampler, steps, ranks)?;
        let mut clock = Instant::now();
        loop {
            if self.phase() == Phase::Training && self.evaluation_is_due() {
                if self.evaluate()? == Progress::Stopped {
                    return Ok(Progress::Stopped);
                }
                clock = Instant::now();
            }
            if self.stopping()? {
                return Ok(Progress::Stopped);
            }
            let Some((batch, meta)) = batches.next().transpose()? else { return Ok(Progress::Done) };
            self.step(&batch, meta.as_ref(), &mut clock)?;
        }
    }

    /// Runs the rehearsal, if the settings ask for one and it is not done yet: learns lambda on a separate network.
    fn rehearse(&mut self) -> Result<Progress> {
        let steps = self.settings.generator.rehearsal_steps();
        if self.state.rehearsed {
            self.engine.hold_lambda();
        }
        if self.phase() == Phase::Training {
            return Ok(Progress::Done);
        }
        self.engine.rehearse(steps);
        if self.run_steps(steps)? == Progress::Stopped {
            return Ok(Progress::Stopped);
        }
        let network = first_network(self.settings, self.engine.device())?;
        self.engine.restart(network, self.settings);
        first_optimizer(self.settings, &mut self.engine)?;
        (self.state.step, self.state.rehearsed, self.state.steps_without_pairs) = (0, true, 0);
        let loss = self.engine.loss_settings();
        let lambda = Lambda { pos: loss.lambda_pos, neg: loss.lambda_neg };
        (self.tell)(Event::Rehearsed { lambda, steps: self.settings.steps });
        Ok(Progress::Done)
    }

    /// The part of the run that the next step belongs to.
    fn phase(&self) -> Phase {
        self.state.phase(self.settings)
    }

    /// Takes one step on a batch, records it, and writes a checkpoint if one is due.
    fn step(&mut self, batch: &ImageBatch, meta: Option<&ImageBatch>, clock: &mut Instant) -> Result<()> {
        let step = self.state.step;
        self.note_unread(step, batch, meta)?;
        let moved = self.engine.step(step, batch, meta)?;
        self.state.steps_without_pairs += usize::from(!moved);
        self.warn_of_collapse(step);
        let seconds = clock.elapsed().as_secs_f64();
        *clock = Instant::now();
        self.seconds += seconds;
        self.record_step(step, batch.labels.len() as f64 / seconds)?;
        self.state.step += 1;
        let every = self.settings.checkpoint_every;
        if every > 0 && self.state.step.is_multiple_of(every) {
            self.save()?;
        }
        Ok(())
    }

    fn warn_of_collapse(&mut self, step: usize) {
        let spread = self.engine.spread();
        let collapsed = spread < COLLAPSED;
        if !collapsed || self.told_of_collapse {
            return;
        }
        self.told_of_collapse = true;
        (self.tell)(Event::Warning(&format!(
            "the embeddings of step {} have collapsed: all pictures are mapped to one point (spread {spread:.0e}); if it \
             stays so, begin anew with a lower --learning-rate or another --init",
            step + 1
        )));
    }

    /// Whether to evaluate now: after the last step, and where [`evaluates_between`](Self::evaluates_between) says so.
    fn evaluation_is_due(&self) -> bool {
        let done = self.state.step;
        let wanted = done == self.settings.steps || self.evaluates_between(done);
        wanted && self.state.evaluated != Some(done)
    }

    /// Whether `done` is a multiple of `--evaluate-every` epochs, or 0. Not shortly before the end of a cosine schedule;
    /// other schedules do not depend on the number of steps, and a longer run would evaluate there, too.
    fn evaluates_between(&self, done: usize) -> bool {
        let every = self.settings.evaluate_every.unwrap_or(0) * self.sampler.steps_per_epoch();
        let ends = self.settings.optimizer.schedule == ScheduleKind::Cosine;
        let enough = ends && 4 * (self.settings.steps - done) < every;
        done == 0 || every > 0 && done.is_multiple_of(every) && !enough
    }

    /// Continues from `state`, as an earlier process left the run.
    ///
    /// If that was the end of a shorter run, its last evaluation is removed from metrics.jsonl, unless this run evaluates
    /// there, too. The checkpoint is written before the file is truncated, so that being killed in between does no harm.
    pub fn go_on(&mut self, state: RunState) -> Result<()> {
        self.state = RunState { settings: self.state.settings.take(), ranks: self.state.ranks, ..state };
        let done = self.state.step;
        if self.state.evaluated != Some(done) {
            return Ok(());
        }
        let stays = done == self.settings.steps || self.evaluates_between(done);
        if !stays {
            self.state.evaluated = None;
        }
        let facts = self.facts()?;
        let Some(files) = &mut self.files else { return Ok(()) };
        if stays {
            return files.tell_last_again();
        }
        self.state.metrics_bytes = files.metrics.bytes_before_last()?;
        self.state.save(&self.engine, self.settings, &facts, &files.folder.last())?;
        files.metrics.cut(self.state.metrics_bytes)
    }

    /// Measures Recall@K of raw pixels for comparison, once in a run and on rank 0.
    fn measure_pixels(&mut self) -> Result<Progress> {
        if self.state.pixels.is_some() {
            return Ok(Progress::Done);
        }
        let found = match &self.files {
            Some(_) => self.test.recall_by_pixels(self.engine.backend())?,
            None => None,
        };
        if ranks::any(&*self.ranks, self.files.is_some() && found.is_none())? {
            return Ok(Progress::Stopped);
        }
        let Some((recall, readable)) = found else { return Ok(Progress::Done) };
        self.note_unread_in_test(&readable)?;
        let skipped = self.test.len() - readable.len();
        if skipped > 0 {
            (self.tell)(Event::Warning(&format!(
                "{} cannot be read: left out of the evaluation",
                counted(skipped, "test picture")
            )));
        }
        (self.state.pixels, self.state.skipped) = (Some(recall), skipped);
        Ok(Progress::Done)
    }

    /// Measures Recall@K, saves the weights if they are the best so far, and writes a checkpoint.
    fn evaluate(&mut self) -> Result<Progress> {
        let (step, total) = (self.state.step, self.test.len());
        let tell = &mut self.tell;
        let mut progress = |done| tell(Event::Evaluating { done, total });
        let Some(rows) = self.test.embed(&self.engine, &mut progress)? else { return Ok(Progress::Stopped) };
        if self.files.is_some() {
            self.record_evaluation(step, &rows)?;
        }
        self.state.evaluated = Some(step);
        self.save()?;
        Ok(Progress::Done)
    }

    /// Records an evaluation, and saves the weights if they are the best so far.
    fn record_evaluation(&mut self, step: usize, rows: &TestRows) -> Result<()> {
        let ks = self.test.dataset.recall_at;
        let Metrics { recall, r_precision, map_at_r } = rows.measure(self.engine.backend(), ks)?;
        let readable = rows.readable();
        self.note_unread_in_test(&readable)?;
        let (r_precision, map_at_r) = (Some(r_precision), Some(map_at_r));
        let record = EvaluationRecord { step, recall: recall.at.clone(), r_precision, map_at_r };
        self.append(&Record::Evaluation(record.clone()))?;
        (self.tell)(Event::Evaluated(&record));
        let first = |recall: &Recall| recall.get(1).unwrap_or(0.0);
        let better = self.state.best.as_ref().is_none_or(|best| first(&recall) > first(&best.recall));
        if let Some(files) = self.files.as_ref().filter(|_| better) {
            let mut facts = self.facts()?;
            facts.push(("ddtas.recall@1", format!("{:.4}", first(&recall))));
            let shape = self.settings.network_shape();
            checkpoint::save(&self.engine.evaluated(), &shape, &facts, &files.folder.best())?;
            let wanted = (QUERIES, self.settings.seed);
            let shown = choose(&readable.queries, readable.searched(), wanted, |chosen| {
                rows.nearest(self.engine.backend(), chosen, NEIGHBOURS)
            })?;
            self.state.best = Some(Best { step, recall: recall.clone(), shown });
        }
        if step == 0 {
            self.state.before = Some(recall.clone());
        }
        self.state.after = Some(recall);
        Ok(())
    }

    /// Seconds of this process and of earlier ones.
    fn total_seconds(&self) -> f64 {
        self.earlier + self.begun.elapsed().as_secs_f64()
    }

    /// Writes the checkpoint to resume from.
    fn save(&mut self) -> Result<()> {
        self.engine.check_weights(self.state.step)?;
        let total = self.total_seconds();
        let Some(files) = &self.files else { return Ok(()) };
        // First the files that the checkpoint refers to, then the checkpoint.
        self.state.metrics_bytes = files.metrics.sync()?;
        files.folder.write_seconds([self.seconds, total])?;
        self.state.save(&self.engine, self.settings, &self.facts()?, &files.folder.last())
    }

    /// The metadata of every checkpoint.
    fn facts(&self) -> Result<Vec<(&'static str, String)>> {
        let (step, seed) = (self.state.step, self.settings.seed);
        let mut facts = vec![
            ("ddtas.step", step.to_string()),
            ("ddtas.seed", seed.to_string()),
            (checkpoint::IMAGE_SIZE, self.settings.image_size.to_string()),
        ];
        if let Some(generator) = self.engine.generator() {
            let state = serde_json::to_string(generator.thresholds()).map_err(|error| {
                Error::Training(format!("a checkpoint cannot hold the generator: {error}"))
            })?;
            facts.push((checkpoint::GENERATOR, state));
        }
        Ok(facts)
    }

    fn record_step(&mut self, step: usize, images_per_second: f64) -> Result<()> {
        let output = &self.engine.output;
        let (mined_pos, mined_neg) = output.mined();
        let loss = self.engine.loss_settings();
        let finite = |value: f64| value.is_finite().then_some(value);
        let record = StepRecord {
            step,
            epoch: (step + 1) as f64 / self.sampler.steps_per_epoch() as f64,
            loss: output.loss,
            gamma_pos: finite(output.gamma_pos),
            gamma_neg: finite(output.gamma_neg),
            lambda_pos: loss.lambda_pos,
            lambda_neg: loss.lambda_neg,
            mined_pos,
            mined_neg,
            active: output.active,
            mean_pos: finite(output.mean_pos),
            mean_neg: finite(output.mean_neg),
            learning_rate: self.engine.learning_rate(step),
            hypergradient: self
                .engine
                .generator()
                .and_then(Generator::last_hypergradient)
                .map(|gradient| [gradient.pos, gradient.neg]),
            sent_bytes: self.engine.sent(),
        };
        self.append(&match self.phase() {
            Phase::Rehearsal => Record::Rehearsal(record.clone()),
            Phase::Training => Record::Step(record.clone()),
        })?;
        (self.tell)(Event::Step { record: &record, images_per_second });
        Ok(())
    }

    fn append(&mut self, record: &Record) -> Result<()> {
        self.files.as_mut().map_or(Ok(()), |files| files.append(record))
    }

    /// Writes the report and the last checkpoint.
    fn finish(&mut self) -> Result<Outcome> {
        let folder = self.files.as_ref().map(|files| files.path().to_path_buf());
        let summary = folder.map(|folder| self.report(&folder)).transpose()?;
        self.state.finished = true;
        self.save()?;
        Ok(summary.map_or(Outcome::OnRank0, |summary| Outcome::Finished(Box::new(summary))))
    }

    /// Writes the report.
    fn report(&mut self, folder: &Path) -> Result<Summary> {
        if self.state.replaced > 0 {
            (self.tell)(Event::Warning(&format!(
                "unreadable training pictures were replaced by others of their class {}",
                counted(self.state.replaced, "time")
            )));
        }
        if self.state.steps_without_pairs > 0 {
            (self.tell)(Event::Warning(&format!(
                "{} of {} batches had no mined pair and changed no weight",
                self.state.steps_without_pairs, self.settings.steps
            )));
        }
        let none = || Error::Training("no evaluation took place".into());
        let pixels = self.state.pixels.as_ref().ok_or_else(none)?;
        let best = self.state.best.as_ref().ok_or_else(none)?;
        let [train, test] = self.dataset.extents();
        let (queries, sheet) = report::queries(&self.dataset.test, self.dataset.searched(), &best.shown)?;
        let mut baselines = vec![Baseline { name: "raw pixels".into(), recall: pixels.at.clone() }];
        if best.step != self.settings.steps && !self.evaluates_between(best.step) {
            // `go_on` has removed it from metrics.jsonl.
            let name = format!("best, after {}, the end of a shorter run", counted(best.step, "step"));
            baselines.push(Baseline { name, recall: best.recall.at.clone() });
        }
        let findings = Findings {
            dataset: self.dataset.name.clone(),
            train,
            test,
            seen: self.dataset.seen,
            baselines,
            training_seconds: self.seconds,
            queries,
        };
        findings.save(folder, &sheet)?;
        report::write(folder)?;
        let seconds = [self.seconds, self.total_seconds()];
        Summary::of(&self.state, self.settings, folder, self.dataset.seen, seconds).ok_or_else(none)
    }
}

/// The error of an interrupted run, with advice: how to resume it, or for a diverged run the weights of its
/// best evaluation, which was after `best` steps, if any.
fn cut_short(error: Error, ranks: &dyn Collective, folder: &RunFolder, best: Option<usize>) -> Error {
    match error {
        Error::Diverged(reason) => Error::Diverged(match best {
            Some(step) => {
                format!("{reason}; {} holds the best weights, after step {step}", folder.best().display())
            }
            None => reason,
        }),
        Error::Program(Program::Io { .. } | Program::Library(ddtas::Error::Device { .. }))
        | Error::Dataset(_)
        | Error::Training(_)
        | Error::Image { .. }
        | Error::Lost(_)
        | Error::Rank { .. } => {
            Error::Interrupted { cause: Box::new(error), command: ranks.to_resume(folder.path()) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diverged_run_names_its_weights_and_any_other_how_it_goes_on() {
        let folder = RunFolder::at(Path::new("run"));
        let said = |error, best| cut_short(error, &ranks::One, &folder, best).to_string();
        let diverged = || Error::Diverged("NaN".into());
        assert_eq!(
            said(diverged(), Some(3)),
            "NaN; run/best.safetensors holds the best weights, after step 3"
        );
        assert_eq!(said(diverged(), None), "NaN");
        let panicked = Error::Training("a loader thread panicked at batch 7".into());
        let wanted = "a loader thread panicked at batch 7; fix this, then run: ddtas-train --resume run";
        assert_eq!(said(panicked, Some(3)), wanted);
    }
}
