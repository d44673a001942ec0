//! What the benchmarks share: the machine's processors, the backends that they compare, names of
//! measurements, and numbers.

pub mod backend;
mod facts;
pub mod machine;
pub mod options;
mod plot;
pub mod points;
pub mod profile;
pub mod report;
pub mod suite;

/// The one in the middle, or just above it. Panics if there is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
