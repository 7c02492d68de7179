//! Training: progress while it runs, the table when it is done.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ddtas::retrieval::Recall;
use ddtas::train::{EvaluationRecord, Event, StepRecord, Summary, TrainSettings};
use indicatif::{ProgressBar, ProgressStyle};

/// Trains by `settings` and prints what it came to.
pub fn train(settings: &TrainSettings) -> ddtas::Result<()> {
    let mut progress = Progress::new(settings);
    let outcome = ddtas::train::train(settings, &mut |event| progress.show(event));
    if outcome.is_err() {
        progress.bar.finish_and_clear();
    }
    print_summary(settings, &outcome?);
    Ok(())
}

/// A bar on a terminal, a line every few seconds elsewhere.
struct Progress {
    bar: ProgressBar,
    steps: usize,
    terminal: bool,
    last_line: Option<Instant>,
}

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    fn new(settings: &TrainSettings) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(settings.steps as u64) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} [{elapsed}<{eta}] {msg}") {
            bar.set_style(style);
        }
        Self { bar, steps: settings.steps, terminal, last_line: None }
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Computing { device, reason: None } => self.line(&format!("computing on {device}")),
            Event::Computing { device, reason: Some(reason) } => {
                self.line(&format!("computing on {device}: {reason}"));
            }
            Event::Started { dataset, folder, steps_per_epoch } => self.line(&format!(
                "{}: {} training pictures of {} classes, {} test pictures of {} unseen classes; {} steps an epoch; results in {}",
                dataset.name,
                dataset.train.len(),
                dataset.train.class_names().len(),
                dataset.test.len(),
                dataset.test.class_names().len(),
                steps_per_epoch,
                folder.display(),
            )),
            Event::Warning(warning) => self.line(&format!("warning: {warning}")),
            Event::Step { record, images_per_second } => self.step(record, images_per_second),
            Event::Evaluating { done, total } => {
                self.bar.set_message(format!("evaluating: {done} of {total} pictures"));
            }
            Event::Evaluated(record) => self.line(&evaluation_line(record)),
            _ => {}
        }
    }

    fn step(&mut self, record: &StepRecord, images_per_second: f64) {
        let gamma = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
        let lambda = if record.lambda_pos == record.lambda_neg {
            format!("{:.3}", record.lambda_pos)
        } else {
            format!("{:.3}/{:.3}", record.lambda_pos, record.lambda_neg)
        };
        let message = format!(
            "loss {:.3}  gamma+ {}  gamma- {}  lambda {lambda}  mined {}+{}  {images_per_second:.0} images/s",
            record.loss,
            gamma(record.gamma_pos),
            gamma(record.gamma_neg),
            record.mined_pos,
            record.mined_neg,
        );
        let done = record.step + 1;
        self.bar.set_position(done as u64);
        let due = self.last_line.is_none_or(|last| last.elapsed() > LINE_EVERY) || done == self.steps;
        if !self.terminal && due {
            self.last_line = Some(Instant::now());
            eprintln!("step {done}/{}: {message}", self.steps);
        }
        self.bar.set_message(message);
    }

    fn line(&self, line: &str) {
        if self.terminal {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }
}

fn evaluation_line(record: &EvaluationRecord) -> String {
    let recalls: Vec<String> =
        record.recall.iter().map(|(k, recall)| format!("R@{k} {:.1}", 100.0 * recall)).collect();
    format!("after {} steps: {}", record.step, recalls.join("  "))
}

fn print_summary(settings: &TrainSettings, summary: &Summary) {
    let row = |name: &str, recall: &Recall| {
        let cells: String = recall.at.iter().map(|(_, recall)| format!("{:8.1}", 100.0 * recall)).collect();
        println!("{name:<28}{cells}");
    };
    let header: String = summary.before.at.iter().map(|(k, _)| format!("{:>8}", format!("R@{k}"))).collect();
    println!("\n{:<28}{header}", "Recall@K on unseen classes");
    row("raw pixels", &summary.pixels);
    row("untrained network", &summary.before);
    row(&format!("trained, {} steps", settings.steps), &summary.after);
    if summary.best_step != settings.steps {
        row(&format!("best, after {} steps", summary.best_step), &summary.best);
    }
    println!(
        "\n{} queries, seed {}, {:.0} s of training, {:.0} s in all; run folder: {}",
        summary.before.queries,
        settings.seed,
        summary.training_seconds,
        summary.total_seconds,
        summary.folder.display(),
    );
}
