package proxy

import (
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/chains.golden")

// The order of the links is a decision. Whoever changes it says so here.
func TestChainsAreTheListsThatWereReviewed(t *testing.T) {
	r := newRig(t, "127.0.0.1:1")
	got := "inbound\n" + r.inbound.chain.String() + "\noutbound\n" + newDoor(r.outbound, "").chain.String()
	for _, c := range []chain{r.inbound.chain, newDoor(r.outbound, "").chain} {
		seen := map[string]bool{}
		for _, l := range c {
			if seen[l.name] || l.why == "" || l.enter == nil && l.leave == nil {
				t.Errorf("link %q stands twice, says not why it is there, or does nothing", l.name)
			}
			seen[l.name] = true
		}
	}
	const file = "testdata/chains.golden"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the chains are now\n%s\nrun go test ./internal/proxy -run Chains -update when that is meant", got)
	}
}

// A chain feels what stands below, and leaves what it entered, in order.
func TestChainLeavesWhatItEntered(t *testing.T) {
	r := newRig(t, app(t, hello))
	var seen []string
	step := func(name string, enter func(*call) *refusal) link {
		return link{name: name, enter: enter, leave: func(*call) { seen = append(seen, name) }}
	}
	pass := func(*call) *refusal { return nil }
	for _, c := range []struct {
		name string
		last func(*call) *refusal
		want string
	}{
		{"all pass", pass, "c b a"},
		{"one refuses", func(*call) *refusal { return &refusal{status: 503, detail: "no"} }, "b a"},
		{"one panics", func(*call) *refusal { panic("no") }, "b a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			seen = nil
			x := onCall(t, r)
			chain{step("a", pass), step("b", pass), step("c", c.last)}.run(x)
			if got := strings.Join(seen, " "); got != c.want {
				t.Errorf("left %q, want %q", got, c.want)
			}
			if panics := slices.Contains([]string{"one panics"}, c.name); x.broken != panics {
				t.Errorf("broken = %v", x.broken)
			}
		})
	}
}
