package mesh

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestGroup(t *testing.T) {
	agent := spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/n1")
	shop := spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/payment")
	facts := []Selector{{Type: "k8s_psat", Value: "cluster:eu"}}
	for _, tt := range []struct {
		selectors string
		in        bool
	}{
		{"spiffe://corp.example/ns/shop/sa/payment", true},
		{"spiffe://corp.example/ns/shop/**", true},
		{"spiffe://corp.example/ns/*/sa/payment", true},
		{"spiffe://corp.example/ns/shop", false},
		{"spiffe://other.example/**", false},
		{"agent=spiffe://corp.example/spire/agent/join_token/n1", true},
		{"agent=spiffe://corp.example/spire/agent/join_token/*", true},
		{"agent=spiffe://corp.example/spire/agent/join_token/n2", false},
		{"kind=sidecar", true},
		{"kind=gateway", false},
		{"node=k8s_psat:cluster:eu", true},
		{"node=k8s_psat:cluster:us", false},
		{"kind=gateway spiffe://corp.example/ns/shop/**", true},
		{"99.99%", true},
	} {
		g, err := ParseGroup(strings.Fields(tt.selectors))
		if err != nil {
			t.Errorf("%s: %v", tt.selectors, err)
		}
		if got := g.Has(agent, shop, "sidecar", facts); got != tt.in {
			t.Errorf("%s has it: %t, want %t", tt.selectors, got, tt.in)
		}
	}
	if (Group{}).Has(agent, shop, "sidecar", facts) {
		t.Error("the zero group has somebody")
	}
}

func TestGroupRefuses(t *testing.T) {
	for sel, want := range map[string]string{
		"":                           "chooses no proxy",
		"payment":                    "chooses no proxy",
		"label=x":                    "chooses no proxy",
		"0%":                         "not a share",
		"100%":                       "not a share",
		"-5%":                        "not a share",
		"NaN%":                       "not a share",
		"1e1%":                       "not a share",
		"0x5%":                       "not a share",
		"%":                          "not a share",
		"spiffe://corp.example":      "append /**",
		"spiffe://*/x":               "written out",
		"spiffe://corp.example/a/b*": "stands for a whole segment",
		"agent=n1":                   "not a SPIFFE ID",
		"agent=":                     "not a SPIFFE ID",
		"kind=proxy":                 "sidecar or gateway",
		"node=x":                     "is not like",
		"node=colour:blue":           "unknown selector",
	} {
		if _, err := ParseGroup([]string{sel}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", sel, err, want)
		}
	}
	if _, err := ParseGroup(nil); err == nil {
		t.Error("a group of nobody")
	}
	if _, err := ParseGroup(make([]string, maxGroup+1)); err == nil {
		t.Error("a group of too many selectors")
	}
}

// TestShare draws the same proxies each time, about as many as asked for, and
// those of a smaller share among those of a greater.
func TestShare(t *testing.T) {
	const all = 4000
	five, twenty := 0, 0
	for i := range all {
		agent := spiffeid.RequireFromString(fmt.Sprintf("spiffe://corp.example/spire/agent/join_token/n%d", i))
		has := func(share string) bool {
			g, err := ParseGroup([]string{share})
			if err != nil {
				t.Fatal(err)
			}
			return g.Has(agent, agent, "sidecar", nil)
		}
		a, b := has("5%"), has("20%")
		if a && !b {
			t.Fatalf("%s is among 5%% and not among 20%%", agent)
		}
		if a {
			five++
		}
		if b {
			twenty++
		}
	}
	if five < all*4/100 || five > all*6/100 || twenty < all*18/100 || twenty > all*22/100 {
		t.Errorf("5%% are %d and 20%% are %d of %d", five, twenty, all)
	}
}

func FuzzGroup(f *testing.F) {
	for _, s := range []string{"5%", "0.01%", "kind=gateway", "agent=spiffe://a.b/c/**", "node=k8s_psat:cluster:eu", "spiffe://a.b/*/c"} {
		f.Add(s)
	}
	id := spiffeid.RequireFromString("spiffe://a.b/x/c")
	f.Fuzz(func(t *testing.T, s string) {
		g, err := ParseGroup([]string{s})
		if err == nil && len(g.any) != 1 {
			t.Errorf("%q is %+v", s, g)
		}
		g.Has(id, id, "sidecar", nil)
	})
}
