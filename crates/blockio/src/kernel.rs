//! What the kernel that we run on is known for.

/// Whether it is as new as this version, as far as can be told: major and minor number.
pub(crate) fn is_at_least(version: (u32, u32)) -> bool {
    rustix::system::uname().release().to_str().is_ok_and(|release| is_release_at_least(release, version))
}

/// The same of the kernel of this release, such as `6.18.44-amd64`.
fn is_release_at_least(release: &str, version: (u32, u32)) -> bool {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|found| found >= version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_as_new_as_their_numbers_say() {
        for new in ["6.6.0", "6.6", "6.18.44-fc-v769", "6.12.9+deb13-amd64", "7.0.0-rc1", "10.0"] {
            assert!(is_release_at_least(new, (6, 6)), "{new}");
        }
        for old in ["6.1.0-48-cloud-amd64", "6.5.13", "5.19.0", "4.18.0-553.el8", "6", "", "rc", "x.6.7"] {
            assert!(!is_release_at_least(old, (6, 6)), "{old}");
        }
    }
}
