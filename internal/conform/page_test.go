package conform

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const page = "../../docs/conformance.md"

// TestThePageIsTheTable keeps docs/conformance.md as it is in Musts. To write
// it anew: UPDATE=1 go test ./internal/conform -run ThePage
func TestThePageIsTheTable(t *testing.T) {
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(b), "| # |")
	if !ok {
		t.Fatalf("%s has no table", page)
	}
	want := head + Page()
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(b) != want {
		t.Errorf("%s is not what Musts says; next: UPDATE=1 go test ./internal/conform -run ThePage", page)
	}
}

// TestEachDemandIsShownSomewhere finds every test that Musts names.
func TestEachDemandIsShownSomewhere(t *testing.T) {
	if len(musts) != 134 {
		t.Fatalf("%d demands, want 134", len(musts))
	}
	for i, m := range musts {
		if m.Number != i+1 {
			t.Errorf("demand %d stands at %d", m.Number, i+1)
		}
		if m.Absent == "" && len(m.Forms)+len(m.Tests) == 0 {
			t.Errorf("%d: nothing shows it", m.Number)
		}
		for _, name := range m.Tests {
			if err := find(name); err != "" {
				t.Errorf("%d: %s: %s", m.Number, name, err)
			}
		}
	}
}

// find looks for a test, and for the row of its table, in the source.
func find(name string) string {
	dir, test, _ := strings.Cut(name, " ")
	test, row, rows := strings.Cut(test, ": ")
	files, _ := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err.Error()
		}
		_, body, ok := strings.Cut(string(b), "\nfunc "+test+"(")
		if !ok {
			continue
		}
		body, _, _ = strings.Cut(body, "\n}\n")
		if rows && !strings.Contains(body, `"`+row+`"`) {
			return "the test has no such row"
		}
		return ""
	}
	return "there is no such test"
}

func TestFindIsNotPleasedByAnything(t *testing.T) {
	for name, want := range map[string]string{
		"internal/conform TestNames":        "",
		"internal/conform TestNames: right": "",
		"internal/conform TestNames: left":  "no such row",
		"internal/conform TestNobodyWrote":  "no such test",
		"internal/nowhere TestNames":        "no such test",
	} {
		if got := find(name); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
