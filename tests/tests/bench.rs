//! The benchmark runs, whole: `ci/bench` would not fail for the first time when its figures are wanted.

use pristine_tests::bench::suite::{Plan, run, store};
use pristine_tests::program::{scratch_dir, scratch_root};

/// Every measurement of the suite is made, and each table and the picture have it. Tiny disks and
/// fractions of a second: the figures mean nothing.
#[test]
fn suite_in_little_gives_full_tables_and_a_picture() {
    let (tmpfs, disk) = (scratch_dir("/dev/shm".as_ref()), scratch_dir(&scratch_root()));
    let plan = Plan::trial(tmpfs.path().to_owned(), disk.path().to_owned());
    let sections = run(&plan);
    let out = disk.path().join("results");
    let table = store(&sections, &plan, &out);
    assert_eq!(std::fs::read_to_string(out.join("table.md")).unwrap(), table);
    assert!(sections.len() > 12, "{table}");
    for section in &sections {
        assert!(!section.rows.is_empty(), "{table}");
        assert!(table.contains(&section.title), "{table}");
        for row in &section.rows {
            // Idle servers may really have done nothing; and one that waited all through so short a measurement, on a
            // machine that is busy with something else, has used no processor time.
            let nothing = section.unit.contains('%');
            assert!(nothing || section.ratio(row).is_some_and(|ratio| ratio >= 0.0), "{row:?}: {table}");
            assert!(row.values.iter().flatten().all(|value| value.is_finite()), "{row:?}: {table}");
        }
    }
    let aims = table.lines().filter(|line| line.ends_with("| reached |") || line.contains("| **no**"));
    assert_eq!(aims.count(), 72, "{table}");
    let picture = std::fs::read_to_string(out.join("plot.svg")).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"), "{picture}");
    assert!(picture.matches("class=\"c0\"").count() > 40 && !picture.contains("NaN"), "{picture}");
    // Everything else that was made is gone.
    assert_eq!(std::fs::read_dir(tmpfs.path()).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(disk.path()).unwrap().count(), 1);
}
