//! What the benchmarks share: the machine's processors, the backends that they compare, names of
//! measurements, and numbers.

pub mod backend;
pub mod machine;
pub mod options;
pub mod points;

/// The one in the middle, or just above it. Panics if there is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
