package meshtest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// A Ledger is a file of all cases that hold a numbered rule, over the tests of
// several rooms. Each room adds its own and checks that the file lists exactly
// those: "NN accept|refuse room: name".
type Ledger struct {
	Path, Room string
	cases      []string
}

// Add notes a case.
func (l *Ledger) Add(rule int, accept bool, name string) {
	l.cases = append(l.cases, fmt.Sprintf("%02d %s %s: %s", rule, verdict(accept), l.Room, name))
}

func verdict(accept bool) string {
	if accept {
		return "accept"
	}
	return "refuse"
}

// Check compares the cases with those that the file has of the room. With
// update it writes them there.
func (l *Ledger) Check(t testing.TB, update bool) {
	t.Helper()
	var mine, others []string
	for _, line := range l.lines(t) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == l.Room+":" {
			mine = append(mine, line)
		} else {
			others = append(others, line)
		}
	}
	slices.Sort(l.cases)
	if update {
		all := slices.Concat(others, l.cases)
		slices.Sort(all)
		if err := os.WriteFile(l.Path, []byte(strings.Join(all, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	slices.Sort(mine)
	if !slices.Equal(mine, l.cases) {
		t.Errorf("%s does not list the cases of %s as they are: run the test with -update when that is meant", l.Path, l.Room)
	}
}

// Complete checks that each rule from 1 to n has a case that is accepted and
// one that is refused, and gives the number of cases.
func (l *Ledger) Complete(t testing.TB, n int) (cases int) {
	t.Helper()
	all := l.lines(t)
	for rule := 1; rule <= n; rule++ {
		for _, accept := range []bool{true, false} {
			begin := fmt.Sprintf("%02d %s ", rule, verdict(accept))
			if !slices.ContainsFunc(all, func(s string) bool { return strings.HasPrefix(s, begin) }) {
				t.Errorf("rule %d has no case to %s", rule, verdict(accept))
			}
		}
	}
	return len(all)
}

func (l *Ledger) lines(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimRight(string(b), "\n"), "\n")
}
