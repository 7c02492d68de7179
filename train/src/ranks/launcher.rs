//! The rank of this process, from the environment variables that a launcher sets.

use crate::{Error, Result};

/// Variables for the rank, the number of ranks, and the rank on its machine: of torchrun and similar launchers, and of srun.
const NAMES: [[&str; 3]; 2] =
    [["RANK", "WORLD_SIZE", "LOCAL_RANK"], ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]];

/// Values of a launcher's variables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Launched {
    pub rank: usize,
    pub size: usize,
    /// The rank on its machine; some launchers do not set it.
    pub local_rank: Option<usize>,
}

impl Launched {
    /// Reads the variables, which `variable` returns by name.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) names a variable that is missing or invalid.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let misused = |reason: String| Error::misuse("ranks", "nccl", reason);
        let found = NAMES.into_iter().find(|[rank, ..]| variable(rank).is_some());
        let [rank_name, size_name, local_name] = found.unwrap_or(NAMES[0]);
        let number = |name: &str| -> Result<Option<usize>> {
            let parse = |text: String| {
                let refused = || misused(format!("{name}={text} is not a number of 0 to 65535"));
                text.trim().parse::<u16>().map(usize::from).map_err(|_| refused())
            };
            variable(name).map(parse).transpose()
        };
        let needed = |name: &str| {
            number(name)?.ok_or_else(|| {
                misused(format!(
                    "{name} is not set: it is for processes whose launcher sets RANK and WORLD_SIZE for each, as torchrun does"
                ))
            })
        };
        let (rank, size) = (needed(rank_name)?, needed(size_name)?);
        if rank >= size {
            return Err(misused(format!(
                "{rank_name}={rank} is out of range: ranks count from 0, and {size_name}={size}"
            )));
        }
        // Users set LOCAL_RANK=0 besides srun's variables if each process sees only its own GPU.
        let local_rank = number("LOCAL_RANK")?.map_or_else(|| number(local_name), |rank| Ok(Some(rank)))?;
        Ok(Self { rank, size, local_rank })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Launched> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Launched::read(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_understood() {
        let launched = |rank, size, local_rank| Launched { rank, size, local_rank };
        let torchrun = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("SLURM_PROCID", "0")];
        assert_eq!(read(&torchrun).unwrap(), launched(5, 8, Some(1)));
        assert_eq!(read(&torchrun[..2]).unwrap(), launched(5, 8, None));
        let srun =
            [("SLURM_PROCID", "2"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "2"), ("LOCAL_RANK", "0")];
        assert_eq!(read(&srun[..3]).unwrap(), launched(2, 4, Some(2)));
        assert_eq!(read(&srun).unwrap(), launched(2, 4, Some(0)));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let cases: [(&[(&str, &str)], &str); 6] = [
            (&[], "RANK is not set"),
            (&[("RANK", "0")], "WORLD_SIZE is not set"),
            (&[("RANK", "first"), ("WORLD_SIZE", "2")], "RANK=first"),
            (&[("RANK", "0"), ("WORLD_SIZE", "-2")], "WORLD_SIZE=-2"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK=2 is out of range"),
            (&[("SLURM_PROCID", "1")], "SLURM_NTASKS is not set"),
        ];
        for (variables, want) in cases {
            let said = read(variables).unwrap_err().to_string();
            assert!(said.contains(want) && said.lines().count() == 1, "{variables:?}: {said}");
        }
    }
}
