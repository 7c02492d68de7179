//! References larger than memory: a batch against rows in a file, of which one block at a time is read.
//!
//! `cargo run --release -p ddtas --no-default-features --example reference_blocks`
//!
//! Uses the four steps of a part, here all anchors against one block, and combines the blocks' results
//! between the steps. A backend remembers one part, so each pass over the file repeats the steps before its
//! own.

use std::fs::File;
use std::io::{Error as IoError, Read, Seek, SeekFrom, Write};

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, Identity, LossOutput, LossSettings, RowNumbers, Rows};
use ndarray::{Array2, Axis, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const REFERENCES: usize = 20_000;
const BLOCK: usize = 3_000;
const DIM: usize = 64;
const CLASSES: i64 = 500;
/// The batch is a stretch of the file: each anchor is a reference, too, and no pair of itself.
const BATCH: std::ops::Range<usize> = 5_950..6_050;

/// Rows in a file, one behind the other; their labels in memory.
struct Bank {
    file: File,
    labels: Vec<i64>,
}

impl Bank {
    /// Draws rows around a centre for each class, block by block.
    fn draw(path: &std::path::Path) -> Outcome<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let labels: Vec<i64> = (0..REFERENCES).map(|_| random.random_range(0..CLASSES)).collect();
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        for labels in labels.chunks(BLOCK) {
            let mut rows = Array2::<f32>::zeros((labels.len(), DIM));
            for (mut row, &label) in rows.axis_iter_mut(Axis(0)).zip(labels) {
                let mut centre = ChaCha8Rng::seed_from_u64(1_000 + label as u64);
                row.mapv_inplace(|_| centre.random::<f32>() - 0.5 + 1.2 * (random.random::<f32>() - 0.5));
                let length = row.dot(&row).sqrt();
                row /= length;
            }
            let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
            file.write_all(&bytes)?;
        }
        Ok(Self { file, labels })
    }

    fn read(&mut self, first: usize, end: usize) -> Result<Array2<f32>, IoError> {
        let mut bytes = vec![0; (end - first) * DIM * 4];
        self.file.seek(SeekFrom::Start((first * DIM * 4) as u64))?;
        self.file.read_exact(&mut bytes)?;
        let value = |at: usize| f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Array2::from_shape_fn((end - first, DIM), |(row, d)| value((row * DIM + d) * 4)))
    }
}

/// The loss of the batch against the whole file, a block in memory at a time. Its gradient is that of the anchors.
fn in_blocks(bank: &mut Bank, settings: &LossSettings) -> Outcome<LossOutput> {
    let anchors = bank.read(BATCH.start, BATCH.end)?;
    let anchor_labels = bank.labels[BATCH].to_vec();
    let mut backend = CpuBackend::new();
    let mut found = LossOutput::default();
    let mut all = LossOutput {
        min_pos: vec![f32::INFINITY; BATCH.len()],
        max_neg: vec![f32::NEG_INFINITY; BATCH.len()],
        count_pos: vec![0; BATCH.len()],
        count_neg: vec![0; BATCH.len()],
        gradient: Array2::zeros(anchors.dim()),
        ..LossOutput::default()
    };
    for pass in 0..4 {
        // Sizes of both sets over all blocks, once the third pass has counted them.
        let (pos, neg) = (all.count_pos.clone(), all.count_neg.clone());
        for first in (0..REFERENCES).step_by(BLOCK) {
            let end = REFERENCES.min(first + BLOCK);
            let block = bank.read(first, end)?;
            let known: Vec<u32> = BATCH
                .map(|row| if (first..end).contains(&row) { (row - first) as u32 } else { Identity::ABSENT })
                .collect();
            let part = Batch::part(
                Rows::new(anchors.view(), &anchor_labels),
                Rows::new(block.view(), &bank.labels[first..end]),
                Identity::List(&known),
                BATCH.len(),
            );
            backend.same_class(&part, settings, &mut found)?;
            if pass == 0 {
                all.min_pos.iter_mut().zip(&found.min_pos).for_each(|(all, found)| *all = all.min(*found));
                all.total_pos += found.total_pos;
                continue;
            }
            // References without numbers, so the block selects nothing.
            backend.sweep(&part, RowNumbers::new(&all.min_pos, &[]), &mut found)?;
            if pass == 1 {
                all.max_neg.iter_mut().zip(&found.max_neg).for_each(|(all, found)| *all = all.max(*found));
                all.probe_neg += found.probe_neg;
                continue;
            }
            backend.select(&part, RowNumbers::new(&all.max_neg, &[]), all.pair_totals(), &mut found)?;
            if pass == 2 {
                all.count_pos.iter_mut().zip(&found.count_pos).for_each(|(all, found)| *all += found);
                all.count_neg.iter_mut().zip(&found.count_neg).for_each(|(all, found)| *all += found);
                continue;
            }
            backend.gradient(&part, RowNumbers::new(&pos, &[]), RowNumbers::new(&neg, &[]), &mut found)?;
            all.loss += found.loss;
            all.gradient += &found.gradient;
        }
    }
    Ok(all)
}

fn main() -> Outcome<()> {
    let path = std::env::temp_dir().join(format!("ddtas-blocks-{}.f32", std::process::id()));
    let mut bank = Bank::draw(&path)?;
    let settings = LossSettings::default();
    let blocks = in_blocks(&mut bank, &settings)?;

    // The same with everything in memory.
    let rows = bank.read(0, REFERENCES)?;
    std::fs::remove_file(path)?;
    let anchors = rows.slice(s![BATCH, ..]);
    let batch =
        Batch::rectangular(Rows::new(anchors, &bank.labels[BATCH]), Rows::new(rows.view(), &bank.labels))
            .with_identity(Identity::From(BATCH.start));
    let mut whole = LossOutput::default();
    CpuBackend::new().loss(&batch, &settings, &mut whole)?;

    let largest = whole.gradient.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let error = (&whole.gradient - &blocks.gradient).iter().fold(0.0f32, |most, x| most.max(x.abs()));
    println!("{} anchors against {REFERENCES} references in blocks of {BLOCK}", BATCH.len());
    println!("loss in blocks {:.9}, at once {:.9}, {} anchors active", blocks.loss, whole.loss, whole.active);
    println!("gradient within {:.1e} of its largest entry", error / largest);
    assert!(whole.active > 0, "the comparison needs a loss");
    assert_eq!((&blocks.min_pos, &blocks.max_neg), (&whole.min_pos, &whole.max_neg));
    assert_eq!((&blocks.count_pos, &blocks.count_neg), (&whole.count_pos, &whole.count_neg));
    assert!((blocks.loss - whole.loss).abs() <= 1e-6 * whole.loss && error <= 1e-6 * largest);
    Ok(())
}
