//! How long requests took: counts in buckets, cheap to add to, exact to 3 %.

/// Each power of two has this many buckets.
const PARTS: u64 = 32;
/// Times of up to 2^36 ns, more than a minute, are told apart.
const POWERS: u64 = 32;

/// Counts of times.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    counts: Box<[u32]>,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Self { counts: vec![0; (PARTS * POWERS) as usize].into() }
    }

    /// Adds a time in nanoseconds.
    pub(super) fn add(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
    }

    /// Adds all of another.
    pub(super) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// The time in microseconds that `share` of all do not exceed; 0 if there are none.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let all: u64 = self.counts.iter().map(|&count| u64::from(count)).sum();
        let mut left = (all as f64 * share).ceil() as u64;
        for (bucket, &count) in (0..).zip(&self.counts) {
            left = left.saturating_sub(u64::from(count));
            if left == 0 {
                return if all == 0 { 0.0 } else { upper_end(bucket) as f64 / 1e3 };
            }
        }
        0.0
    }
}

/// The first power of two has one bucket a nanosecond; each later one is twice as coarse.
fn bucket(nanoseconds: u64) -> usize {
    let shift = u64::from((nanoseconds | PARTS).ilog2() - PARTS.ilog2());
    let bucket = shift * PARTS + (nanoseconds >> shift);
    bucket.min(PARTS * POWERS - 1) as usize
}

/// The first time that is too long for the bucket, in nanoseconds.
fn upper_end(bucket: u64) -> u64 {
    let shift = (bucket / PARTS).saturating_sub(1);
    (bucket - shift * PARTS + 1) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_of_any_time_ends_just_after_it() {
        for exponent in 0..35 {
            for odd in [0, 1, 3] {
                let time = (1_u64 << exponent) + (odd << exponent >> 2);
                let end = upper_end(bucket(time) as u64);
                assert!(time < end && end <= time + time / PARTS + 1, "{time}: {end}");
            }
        }
        assert_eq!(bucket(u64::MAX), (PARTS * POWERS - 1) as usize);
    }

    #[test]
    fn quantiles_of_equal_steps_are_where_they_belong() {
        let mut histogram = Histogram::new();
        (1..=1000).for_each(|us| histogram.add(us * 1000));
        let near = |share, us: f64| (histogram.quantile(share) / us - 1.0).abs() < 0.04;
        assert!(near(0.5, 500.0) && near(0.99, 990.0) && near(1.0, 1000.0));
        assert_eq!(Histogram::new().quantile(0.99), 0.0);
    }
}
