//! Internal snapshots, alone and in trees in which others mixed both kinds: what
//! libvirt cannot delete is refused with what helps, and that helps.

use anyhow::Result;
use serde_json::Value;
use vmsnap_tests::{Blank, BlankSpec, Lab};

use super::{
    NONE, delete_as_told, files_judged, healths, holds, names, reason, refused, still,
    virsh_external, write,
};

/// A tree of both kinds, made by virsh: a name that begins with `i` is internal.
/// After each snapshot the byte of its place is written.
fn mixed(lab: &Lab, tree: &[&str]) -> Result<Blank> {
    let domain = lab.blank(&BlankSpec::default())?;
    for (number, name) in (1..).zip(tree) {
        if name.starts_with('i') {
            domain.virsh("snapshot-create-as", &[name])?;
        } else {
            virsh_external(&domain, name)?;
        }
        write(&domain, number)?;
    }
    Ok(domain)
}

#[test]
fn in_a_mixed_tree_each_delete_that_cannot_be_is_refused_with_what_helps_and_that_helps()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    for (tree, impossible) in [
        (["i1", "e1", "i2"], ["i1", "e1"].as_slice()),
        (["e1", "i1", "e2"], ["e1", "i1", "e2"].as_slice()),
    ] {
        let domain = mixed(&lab, &tree)?;
        let name = domain.name.as_str();
        for snapshot in impossible {
            let failure = refused(&agent, &domain, &["cleanup", name, snapshot])?;
            assert_eq!(reason(&failure), "KINDS_MIXED", "{tree:?}, {snapshot}");
        }
        let more = refused(&agent, &domain, &["create", name, "new"])?;
        assert_eq!(reason(&more), "KINDS_MIXED");
        holds(&domain, &[1, 2, 3])?;
        let mut refusals = 0;
        for snapshot in impossible.iter().rev() {
            if domain.snapshots()?.iter().any(|one| one == snapshot) {
                refusals += delete_as_told(&agent, &domain, snapshot)?;
            }
        }
        assert!(refusals > 1, "{tree:?}");
        assert_eq!(domain.state()?, "shut off", "{tree:?}: as was told");
        // Nothing of the present state went, and nothing is left.
        assert_eq!(domain.snapshots()?, NONE, "{tree:?}");
        assert_eq!(domain.files()?, [format!("{name}.qcow2")], "{tree:?}");
        holds(&domain, &[1, 2, 3])?;
        domain.check("vda")?;
    }
    Ok(())
}

#[test]
fn a_revert_to_an_internal_snapshot_says_which_external_ones_on_its_image_it_would_spoil()
-> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = mixed(&lab, &["i1", "e1", "i2"])?;
    let name = domain.name.as_str();
    let failure = refused(&agent, &domain, &["revert", name, "i1"])?;
    assert_eq!(reason(&failure), "KINDS_MIXED");
    assert_eq!(names(&failure, "lost"), ["i2", "e1"]);
    // The one in the active image spoils nothing.
    agent.vmsnap(&["revert", name, "i2"])?.result()?;
    holds(&domain, &[1, 2])?;
    let forced = agent.vmsnap(&["revert", name, "i1", "--force"])?;
    forced.result()?;
    assert!(forced.warned("SNAPSHOTS_LOST"));
    holds(&domain, &[])?;
    healths(
        &agent,
        &domain,
        &[
            ("e1", "merged_away"),
            ("i1", "whole"),
            ("i2", "merged_away"),
        ],
    )?;
    // libvirt deletes none of them; their entries go, the overlay stays.
    for snapshot in ["e1", "i2"] {
        agent.vmsnap(&["cleanup", name, snapshot])?.result()?;
    }
    assert_eq!(domain.snapshots()?, ["i1"]);
    let overlay = format!("{name}.e1");
    let reported = agent.vmsnap(&["cleanup", name, "--orphans", "delete"])?;
    assert_eq!(files_judged(&reported)?, [(overlay.clone(), false)].into());
    assert!(domain.files()?.contains(&overlay), "it was made by others");
    holds(&domain, &[])
}

#[test]
fn internal_snapshots_go_from_any_place_of_their_tree_on_and_off() -> Result<()> {
    let lab = Lab::from_env()?;
    let agent = lab.agent("")?;
    let domain = still(&lab, BlankSpec::default())?;
    let name = domain.name.as_str();
    let make = |count: u8| -> Result<()> {
        for number in 1..=count {
            let snapshot = format!("i{number}");
            let words = ["create", name, &snapshot, "--kind", "internal"];
            agent.vmsnap(&words)?.result()?;
            write(&domain, number)?;
        }
        Ok(())
    };
    let inside = || -> Result<Vec<String>> {
        let text = lab.qemu_img(["info", "-U", "--output=json", &domain.disk("vda")?])?;
        let info: Value = serde_json::from_str(&text)?;
        let mut names: Vec<String> = info["snapshots"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    };
    make(4)?;
    for state in ["paused", "shut off"] {
        // One in the middle, the newest, the oldest: by name, or as what a commit
        // drops.
        for (words, left) in [
            (vec!["cleanup", name, "i2"], vec!["i1", "i3", "i4"]),
            (vec!["commit", name, "i4"], vec!["i1", "i3"]),
            (
                vec!["cleanup", name, "i1", "--children", "only"],
                vec!["i1"],
            ),
            (vec!["cleanup", name, "i1", "--children", "delete"], vec![]),
        ] {
            agent.vmsnap(&words)?.result()?;
            assert_eq!(domain.snapshots()?, left, "{state}: {words:?}");
            assert_eq!(inside()?, left, "{state}: {words:?}");
            assert_eq!(domain.state()?, state);
        }
        holds(&domain, &[1, 2, 3, 4])?;
        if state == "paused" {
            domain.virsh("destroy", &[])?;
            make(4)?;
        }
    }
    domain.check("vda")
}
