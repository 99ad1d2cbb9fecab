package meshtest

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
)

// Bypasses is what became of the ways past us that a test has tried. It is safe
// for concurrent use.
type Bypasses struct {
	mu             sync.Mutex // guards what follows
	lines          []bypassLine
	passed, failed int
}

type bypassLine struct {
	row  int
	text string
}

// bypassTable is what make bypass sets, which shows the tables of several packages.
const bypassTable = "BYPASS_TABLE"

// Add notes one way, by the number of its row in the corpus; err says that it got
// past us.
func (b *Bypasses) Add(t testing.TB, row int, what, way string, err error) {
	t.Helper()
	said := "refused"
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		said = "FAILED: " + strings.ReplaceAll(err.Error(), "\n", " ")
		b.failed++
		t.Errorf("row %d, %s by %s: %v", row, what, way, err)
	} else {
		b.passed++
	}
	b.lines = append(b.lines, bypassLine{row, fmt.Sprintf("%d\t%s\t%s\t%s\n", row, what, way, said)})
}

// String is the table, and behind it what is open and a line of JSON.
func (b *Bypasses) String(open ...string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.SortStableFunc(b.lines, func(x, y bypassLine) int { return x.row - y.row })
	var out strings.Builder
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	for _, l := range b.lines {
		fmt.Fprint(table, l.text)
	}
	_ = table.Flush()
	for _, o := range open {
		fmt.Fprintln(&out, "open: "+o)
	}
	line, _ := json.Marshal(map[string]any{"name": "bypass", "ok": b.failed == 0 && b.passed > 0, "cases": map[string]int{
		"tried": b.passed + b.failed, "passed": b.passed, "failed": b.failed, "skipped": 0,
	}})
	return out.String() + string(line) + "\n"
}

// Print shows the table where somebody wants to see it.
func (b *Bypasses) Print(open ...string) {
	if os.Getenv(bypassTable) != "" {
		fmt.Print(b.String(open...))
	}
}
