//! What to measure; the arguments of `ddtas-bench throughput`.

use std::path::{Path, PathBuf};

use super::Density;
use super::embeddings::Embeddings;
use crate::arguments::DeviceArguments;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use ddtas::loss::ElementType;
use ddtas_io::files::check_place;
use ddtas_io::{Error, Result};

/// A parser of the rows' type.
fn dtype() -> impl TypedValueParser<Value = ElementType> {
    let about = |dtype| match dtype {
        ElementType::F32 => "Single precision",
        ElementType::F16 => "IEEE half precision",
        ElementType::Bf16 => "Brain floating point",
    };
    let values = ElementType::ALL.map(|dtype| PossibleValue::new(dtype.name()).help(about(dtype)));
    PossibleValuesParser::new(values)
        .map(|name| ElementType::ALL.into_iter().find(|dtype| dtype.name() == name).unwrap_or_default())
}

/// Settings of a measurement. Lists are measured in all combinations.
#[derive(Debug, Clone, clap::Args)]
pub struct ThroughputSettings {
    /// Batch sizes, 1 to 16777216, separated by commas [default: 80,1280,5120].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Dimensions of an embedding, 1 to 65536, separated by commas [default: 512].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub dim: Vec<usize>,
    /// Share of the negative pairs that is mined, as late (0.01), in the middle (0.08) or at the start (0.3) of a
    /// training run: late, middle, start, all (nearly every pair), or a number above 0 and at most 0.6; several separated
    /// by commas [default: late,middle,start,all].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub density: Vec<String>,
    /// Compare the batch with N other rows, 1 to 16777216, instead of with itself.
    #[arg(long, value_name = "N")]
    pub references: Option<usize>,
    /// Type of the embeddings.
    #[arg(long, default_value_t, value_parser = dtype())]
    pub dtype: ElementType,
    /// Where to measure.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// Read the embeddings from this .safetensors file instead of drawing them; --batch, --dim and --references, if given, must fit it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["density", "save_embeddings"])]
    pub embeddings: Option<PathBuf>,
    /// Write the embeddings that were drawn into this file; for one --batch, --dim and --density.
    #[arg(long, value_name = "FILE")]
    pub save_embeddings: Option<PathBuf>,
    /// Seed of the embeddings.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Seconds spent on each measurement, 0 to 3600; five calls are timed however long they take.
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
}

/// Most rows, and most dimensions of one.
const MOST_ROWS: (usize, &str) = (1 << 24, "1 to 16777216");
const MOST_DIMS: (usize, &str) = (1 << 16, "1 to 65536");

/// Settings that have been checked.
pub(super) struct Plan {
    pub batches: Vec<usize>,
    pub dims: Vec<usize>,
    pub densities: Vec<Density>,
    given: [(&'static str, Option<usize>); 3],
}

impl ThroughputSettings {
    /// # Errors
    /// [`Error::Misused`] for TF32's precision of other rows than f32: those of 16 bits are exact.
    pub(super) fn check_products(&self) -> Result<()> {
        if !self.device.tf32 || self.dtype == ElementType::F32 {
            return Ok(());
        }
        Err(Error::misuse("dtype", self.dtype, "--tf32 is for f32 rows"))
    }

    /// # Errors
    /// [`Error::InvalidSetting`] or [`Error::Misused`] for the first setting that is off.
    pub(super) fn plan(&self) -> Result<Plan> {
        let sizes =
            [("batch", &self.batch[..]), ("dim", &self.dim[..]), ("references", self.references.as_slice())];
        for (name, values) in sizes {
            let (most, range) = if name == "dim" { MOST_DIMS } else { MOST_ROWS };
            if let Some(value) = values.iter().find(|value| !(1..=most).contains(*value)) {
                return Err(Error::InvalidSetting { name, value: value.to_string(), range });
            }
        }
        self.check_products()?;
        self.save_embeddings.as_deref().map_or(Ok(()), |path| check_place("save-embeddings", path))?;
        if !(0.0..=3600.0).contains(&self.seconds) {
            let value = self.seconds.to_string();
            return Err(Error::InvalidSetting { name: "seconds", value, range: "0 to 3600" });
        }
        let or = |given: &[usize], usual: &[usize]| if given.is_empty() { usual } else { given }.to_vec();
        let mut densities = vec![Density::Late, Density::Middle, Density::Start, Density::All];
        if !self.density.is_empty() {
            densities = self.density.iter().map(|text| text.parse()).collect::<Result<_>>()?;
        }
        let plan = Plan {
            batches: or(&self.batch, &[80, 1280, 5120]),
            dims: or(&self.dim, &[512]),
            densities,
            given: [
                ("batch", self.batch.first().copied()),
                ("dim", self.dim.first().copied()),
                ("references", self.references),
            ],
        };
        let combinations = plan.batches.len() * plan.dims.len() * plan.densities.len();
        if let (Some(path), 2..) = (&self.save_embeddings, combinations) {
            return Err(Error::Misused {
                name: "save-embeddings",
                value: path.display().to_string(),
                reason: "a file holds one --batch, one --dim and one --density".into(),
            });
        }
        if self.embeddings.is_some() && (self.batch.len() > 1 || self.dim.len() > 1) {
            let (name, values) =
                if self.batch.len() > 1 { ("batch", &self.batch) } else { ("dim", &self.dim) };
            let value = values.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            return Err(Error::misuse(name, value, "--embeddings goes with one, that of the file, or none"));
        }
        Ok(plan)
    }
}

impl Plan {
    /// Checks the shape of a file against the sizes that were given.
    pub fn check_shape(&self, path: &Path, embeddings: &Embeddings) -> Result<()> {
        let (batch, dim) = embeddings.anchors.values.dim();
        let references = embeddings.references.as_ref().map(|rows| rows.labels.len());
        for ((name, wanted), got) in self.given.iter().zip([Some(batch), Some(dim), references]) {
            if wanted.is_some() && *wanted != got {
                let (wanted, got) = (wanted.unwrap_or_default(), got.unwrap_or_default());
                return Err(Error::format(path, format!("--{name} is {wanted}, but the file has {got}")));
            }
        }
        Ok(())
    }
}
