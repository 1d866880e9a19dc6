//! The table of docs/doctor.md, made from the list of checks.

use std::fmt::Write as _;

use super::checks::Check;

/// Every check, one a line.
pub fn table() -> String {
    let mut text = "| id | reads | warns when | fails when | remedy |\n|---|---|---|---|---|\n".to_owned();
    for check in Check::ALL {
        let info = check.info();
        let cell = |text: &str| if text.is_empty() { "-".to_owned() } else { text.replace('|', "\\|") };
        writeln!(
            text,
            "| `{}` | {} | {} | {} | {} |",
            info.id,
            cell(info.reads),
            cell(info.warns),
            cell(info.fails),
            cell(info.remedy)
        )
        .expect("a String takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn docs_list_every_check() {
        const MARK: &str = "<!-- Made from the list of checks; see the end of this page. -->\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/doctor.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (before, after) = page.split_once(MARK).expect("the page has the mark");
        let (written, after) = after.split_once("\n\n").expect("the table ends with an empty line");
        let table = table();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, format!("{before}{MARK}{table}\n{after}")).unwrap();
            return;
        }
        assert!(
            written == table.trim_end(),
            "docs/doctor.md is not that of the code: UPDATE=1 cargo test -p ramferry-agent docs_list_every_check"
        );
    }
}
