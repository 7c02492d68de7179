//! The table: the reference cases, and batches drawn from seeds for shapes and settings that these do not
//! have. No pair of a case lies within [`SLACK`] of a threshold, so counts are exact.

use std::path::Path;

use ddtas::loss::{ElementType, LossSettings, Mining, OwnedEmbeddings, reference};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::random::SLACK;
use crate::{Case, Side, find, is_clear};

/// Every file of tests/golden, by name.
///
/// # Panics
/// If one cannot be read.
#[must_use]
pub fn golden() -> Vec<Case> {
    // Relative to where cargo starts a package's tests, the root or a folder in it: the program may run
    // elsewhere than it was built.
    let folder =
        ["tests/golden", "../tests/golden"].map(Path::new).into_iter().find(|folder| folder.is_dir());
    let files = find(&[folder.expect("the working directory is a package's").to_path_buf()])
        .expect("tests/golden is part of the repository");
    files.iter().map(|path| Case::read(path).expect("a reference case")).collect()
}

/// The reference cases with their rows rounded to another type, those that stay clear of the thresholds.
///
/// # Panics
/// If one cannot be read.
#[must_use]
pub fn golden_in(dtype: ElementType) -> Vec<Case> {
    let rounded = |case: Case| case.rounded_to(dtype).expect("rows of unit length");
    let cases: Vec<Case> = golden().into_iter().map(rounded).filter(clear).collect();
    println!("{} of the reference cases are clear of the thresholds in {dtype:?}", cases.len());
    cases
}

/// Whether f32 arithmetic must find the same sets as float64.
fn clear(case: &Case) -> bool {
    let truth = reference(&case.batch(), &case.settings).expect("a case is valid");
    is_clear(&truth, &case.settings, SLACK)
}

/// How a random batch is drawn.
#[derive(Clone, Copy)]
struct Recipe {
    name: &'static str,
    /// Anchors, and references where the form is rectangular.
    rows: usize,
    references: Option<usize>,
    /// Number of anchors, from the first on, that are references too.
    shared: usize,
    dim: usize,
    /// Noise around a class's centre; 0 makes exact duplicates.
    noise: f32,
    label: fn(usize) -> i64,
    settings: LossSettings,
}

fn classes_of_five(row: usize) -> i64 {
    (row / 5) as i64
}

fn recipes() -> Vec<Recipe> {
    let usual = LossSettings::default();
    let everything = LossSettings { mining: Mining::None, ..usual };
    let recipe = |name, rows, dim, noise, label| Recipe {
        name,
        rows,
        references: None,
        // An image on both sides is an exact duplicate, no positive.
        shared: rows / 10,
        dim,
        noise,
        label,
        settings: usual,
    };
    let against = |references, recipe: Recipe| Recipe { references: Some(references), ..recipe };
    vec![
        recipe("one_row", 1, 7, 1.0, |_| 3),
        recipe("two_rows_of_one_class", 2, 3, 1.0, |_| 3),
        recipe("a_positive_and_a_negative", 3, 5, 1.0, |row| (row / 2) as i64),
        recipe("one_dimension", 40, 1, 1.0, classes_of_five),
        recipe("a_tile_less_one", 127, 63, 1.2, classes_of_five),
        recipe("a_tile", 128, 64, 1.2, classes_of_five),
        recipe("a_tile_and_one", 129, 65, 1.2, classes_of_five),
        recipe("odd_sizes_257x130", 257, 130, 1.5, classes_of_five),
        recipe("unsorted_labels", 200, 48, 1.2, |row| (row * 7919 % 41) as i64),
        recipe("one_class", 150, 32, 1.0, |_| 0),
        recipe("a_class_over_many_tiles", 300, 24, 1.0, |row| i64::from(row >= 270)),
        recipe("all_distinct", 140, 16, 1.0, |row| row as i64),
        recipe("ignored_labels", 140, 40, 1.2, |row| if row % 3 == 0 { -1 } else { (row / 6) as i64 }),
        recipe("all_ignored", 130, 20, 1.0, |_| -7),
        recipe("nothing_mined", 100, 96, 0.05, classes_of_five),
        recipe("duplicates", 60, 40, 0.0, classes_of_five),
        recipe("duplicates_and_ignored_labels", 60, 40, 0.0, |row| {
            if row % 4 == 0 { -1 } else { (row / 5) as i64 }
        }),
        recipe("tight_classes", 60, 32, 0.2, classes_of_five),
        recipe("noise_alone", 100, 32, 20.0, classes_of_five),
        Recipe { settings: everything, ..recipe("everything_mined", 150, 36, 1.0, classes_of_five) },
        Recipe { settings: everything, ..recipe("everything_mined_140x330", 140, 330, 1.5, classes_of_five) },
        Recipe {
            settings: LossSettings { mining: Mining::Symmetric, ..usual },
            ..recipe("symmetric_tolerances", 150, 36, 1.2, classes_of_five)
        },
        Recipe {
            settings: LossSettings { probe_ratio: 1.0, lambda_pos: 0.8, lambda_neg: 0.4, ..usual },
            ..recipe("wide_probe_two_lambdas", 150, 36, 1.2, classes_of_five)
        },
        against(257, recipe("rectangular", 80, 64, 1.2, classes_of_five)),
        against(1, recipe("rectangular_one_reference", 33, 20, 1.2, |_| 1)),
        against(300, recipe("rectangular_one_anchor", 1, 20, 1.2, classes_of_five)),
        against(200, recipe("rectangular_ignored_labels", 140, 33, 1.2, |row| row as i64 % 9 - 1)),
        // Norms of half precision are off 1 by more than the rule on duplicates allows for.
        Recipe {
            shared: 64,
            ..against(64, recipe("rectangular_singletons_on_both_sides", 64, 1024, 1.0, |row| row as i64))
        },
        Recipe {
            shared: 80,
            ..against(200, recipe("rectangular_memory_that_holds_the_batch", 80, 96, 0.4, classes_of_five))
        },
        Recipe {
            settings: everything,
            ..against(150, recipe("rectangular_everything_mined", 140, 17, 1.0, classes_of_five))
        },
    ]
}

/// Every recipe in every type, with references copied from the anchors in part.
#[must_use]
pub fn generated() -> Vec<Case> {
    let recipes = recipes();
    recipes.iter().flat_map(|recipe| ElementType::ALL.map(|dtype| clear_case(recipe, dtype))).collect()
}

/// One of the generated cases.
///
/// # Panics
/// If there is none of this name.
#[must_use]
pub fn generated_case(name: &str, dtype: ElementType) -> Case {
    let recipe = recipes().into_iter().find(|recipe| recipe.name == name);
    clear_case(&recipe.unwrap_or_else(|| panic!("{name} is not in the table")), dtype)
}

/// Every recipe in f32 rows whose pairs keep clear of the thresholds once the rows are rounded to f16.
#[must_use]
pub fn generated_to_round() -> Vec<Case> {
    recipes()
        .iter()
        .map(|recipe| draw(recipe, ElementType::F32, clear_seed(recipe, ElementType::F16)))
        .collect()
}

/// Every recipe in both forms and every way of mining, f32.
#[must_use]
pub fn in_every_way() -> Vec<Case> {
    let usual = LossSettings::default();
    let dual = LossSettings { probe_ratio: 1.0, lambda_pos: 0.9, lambda_neg: 0.4, ..usual };
    let ways = Mining::ALL.map(|mining| LossSettings { mining, ..usual });
    let forms = |recipe: Recipe| {
        let other = Recipe { references: Some(recipe.rows + 37), ..recipe };
        std::iter::once(recipe).chain(recipe.references.is_none().then_some(other))
    };
    let shapes = recipes().into_iter().flat_map(forms);
    let cases = shapes.flat_map(|recipe| {
        ways.iter().chain([&dual]).map(move |&settings| (recipe, settings)).collect::<Vec<_>>()
    });
    cases
        .map(|(recipe, settings)| {
            let case = clear_case(&Recipe { settings, ..recipe }, ElementType::F32);
            let form = if case.references.is_some() { "rectangular" } else { "square" };
            Case { name: format!("{} {form} {}", case.name, settings.mining), ..case }
        })
        .collect()
}

/// Three row tiles on each side, the last of ignored rows alone, 30 % ignored in all, in every width of the
/// gradient's product and more than one block of columns; square, and rectangular with both gradients.
/// 16-bit rows.
///
/// # Panics
/// If the last tile has a row that is not ignored.
#[must_use]
pub fn widths() -> Vec<Case> {
    const TILE: usize = 128;
    let ignored = |row: usize| if row % 10 < 3 { -1 } else { (row / 8) as i64 };
    let (rows, forms) = (350, [None, Some(270)]);
    for count in [rows, 270] {
        // Rows of ignored labels are last in the order of the passes.
        let valid = (0..count).filter(|&row| ignored(row) >= 0).count();
        assert_eq!((count.div_ceil(TILE), valid.div_ceil(TILE)), (3, 2));
    }
    let recipe = |(dim, references): (usize, Option<usize>)| Recipe {
        name: if references.is_none() { "square_width" } else { "rectangular_width" },
        rows,
        references,
        shared: 5,
        dim,
        noise: 2.5,
        label: ignored,
        // So much is mined that every row tile's gradient is computed by tiles, stored or not.
        settings: LossSettings { mining: Mining::None, ..LossSettings::default() },
    };
    [40, 64, 130, 512, 768, 1024]
        .into_iter()
        .flat_map(|dim| forms.map(|references| (dim, references)))
        .zip([ElementType::Bf16, ElementType::F16, ElementType::F16, ElementType::Bf16].into_iter().cycle())
        .map(|(shape, dtype)| {
            let case = clear_case(&recipe(shape), dtype);
            Case { name: format!("{}_{}", case.name, shape.0), ..case }
        })
        .collect()
}

/// So few pairs of wide rows that every row tile's gradient goes by lists if all are stored.
#[must_use]
pub fn sparse(dtype: ElementType) -> Case {
    let settings = LossSettings { mining: Mining::Symmetric, gamma: 0.2, ..LossSettings::default() };
    let recipe = Recipe {
        name: "sparse_400x768",
        rows: 400,
        references: None,
        shared: 0,
        dim: 768,
        noise: 1.5,
        label: |row| (row / 2) as i64,
        settings,
    };
    clear_case(&recipe, dtype)
}

fn clear_case(recipe: &Recipe, dtype: ElementType) -> Case {
    draw(recipe, dtype, clear_seed(recipe, dtype))
}

/// The first seed whose pairs keep clear of every threshold.
fn clear_seed(recipe: &Recipe, dtype: ElementType) -> u64 {
    (0..1000)
        .find(|&seed| clear(&draw(recipe, dtype, seed)))
        .unwrap_or_else(|| panic!("{} has no clear seed", recipe.name))
}

fn draw(recipe: &Recipe, dtype: ElementType, seed: u64) -> Case {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut side = |count: usize| {
        let labels: Vec<i64> = (0..count).map(recipe.label).collect();
        let rows = rows(&labels, recipe, &mut random);
        let tangent = Array2::from_shape_simple_fn((count, recipe.dim), || normal(&mut random));
        (rows, labels, tangent)
    };
    let (rows, labels, tangent) = side(recipe.rows);
    let references = recipe.references.map(|count| {
        let (mut other, labels, tangent) = side(count);
        let shared = recipe.shared.min(count);
        other.slice_mut(ndarray::s![..shared, ..]).assign(&rows.slice(ndarray::s![..shared, ..]));
        Side { rows: OwnedEmbeddings::new(&other, dtype), labels, tangent }
    });
    let anchors = Side { rows: OwnedEmbeddings::new(&rows, dtype), labels, tangent };
    Case::new(recipe.name.into(), recipe.settings, anchors, references).expect("rows of unit length")
}

/// Unit rows: a centre a class, noise around it.
fn rows(labels: &[i64], recipe: &Recipe, random: &mut ChaCha8Rng) -> Array2<f32> {
    let mut rows = Array2::zeros((labels.len(), recipe.dim));
    for (mut row, &label) in rows.outer_iter_mut().zip(labels) {
        let mut centre = ChaCha8Rng::seed_from_u64(1000 + label.unsigned_abs());
        row.mapv_inplace(|_: f32| normal(&mut centre) + recipe.noise * normal(random));
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    rows
}

/// A standard normal variate (Box and Muller).
fn normal(random: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (random.random(), random.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}
