package mesh

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var corp = spiffeid.RequireTrustDomainFromString("corp.example")

// below is an entry whose ID is the last segment of its identity.
func below(parent, id string, selectors ...Selector) Entry {
	if selectors == nil {
		selectors = []Selector{{"unix", "uid:1"}}
	}
	return Entry{
		ID: id[strings.LastIndex(id, "/")+1:], ParentID: spiffeid.RequireFromPath(corp, parent),
		SPIFFEID: spiffeid.RequireFromPath(corp, id), Selectors: selectors,
	}
}

func names(es []Entry) string {
	var out []string
	for _, e := range es {
		out = append(out, e.ID)
	}
	return strings.Join(out, " ")
}

func TestAnAgentHasWhatIsBelowItAndItsGroups(t *testing.T) {
	const server, web1, web2, db = "/spire/server", "/spire/agent/x509pop/web1", "/spire/agent/x509pop/web2", "/spire/agent/x509pop/db"
	cn := func(name string) Selector { return Selector{"x509pop", "subject:cn:" + name} }
	named := func(agent string) Selector { return Selector{"spiffe_id", "spiffe://corp.example" + agent} }
	ours := Selector{"x509pop", "ca:fingerprint:aa"}
	now := time.Unix(1_000_000, 0)
	bare := func(e Entry) Entry { e.Selectors = nil; return e }
	ended := func(e Entry) Entry { e.ExpiresAt = now; return e }
	for _, tc := range []struct {
		name      string
		entries   []Entry
		agent     string
		selectors []Selector
		want      string
	}{
		{"its own, in the order written", []Entry{below(web1, "/b"), below(db, "/x"), below(web1, "/a")}, web1, nil, "b a"},
		{"what is below an identity of its own", []Entry{below("/a", "/b"), below(web1, "/a"), below("/b", "/c")}, web1, nil, "a b c"},
		{"of an alias with just its selectors", []Entry{below(server, "/web", cn("web")), below("/web", "/a")}, web1, []Selector{cn("web")}, "a"},
		{"of an alias with fewer", []Entry{below(server, "/web", cn("web")), below("/web", "/a")}, web1, []Selector{ours, cn("web")}, "a"},
		{"not of an alias with one more", []Entry{below(server, "/web", cn("web"), ours), below("/web", "/a")}, web1, []Selector{cn("web")}, ""},
		{"not of an alias of others", []Entry{below(server, "/web", cn("web")), below("/web", "/a")}, db, []Selector{cn("db")}, ""},
		{"not the alias's own identity", []Entry{below(server, "/web", cn("web"))}, web1, []Selector{cn("web")}, ""},
		{"of an alias by its name", []Entry{below(server, "/web", named(web1)), below(server, "/web", named(web2)), below("/web", "/a")}, web2, nil, "a"},
		{"not by the name of another", []Entry{below(server, "/web", named(web1)), below("/web", "/a")}, web2, nil, ""},
		{"below an alias, at any depth", []Entry{below(server, "/web", cn("web")), below("/web", "/a"), below("/a", "/b"), below("/b", "/c")}, web1, []Selector{cn("web")}, "a b c"},
		{"of two aliases, in the order written", []Entry{below(server, "/g2", ours), below(server, "/g1", cn("web")), below("/g1", "/a"), below("/g2", "/b"), below(web1, "/c")}, web1, []Selector{cn("web"), ours}, "c b a"},
		{"nothing twice", []Entry{below(server, "/web", cn("web")), below(server, "/web", ours), below("/web", "/a")}, web1, []Selector{cn("web"), ours}, "a"},
		{"a ring ends", []Entry{below(web1, "/a"), below("/a", "/b"), below("/b", "/a")}, web1, nil, "a b a"},
		{"not of an alias without selectors", []Entry{bare(below(server, "/web")), below("/web", "/a")}, web1, []Selector{cn("web")}, ""},
		{"not of an alias that has ended", []Entry{ended(below(server, "/web", cn("web"))), below("/web", "/a")}, web1, []Selector{cn("web")}, ""},
		{"not below what has ended", []Entry{ended(below(web1, "/a")), below("/a", "/b")}, web1, nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			agent := spiffeid.RequireFromPath(corp, tc.agent)
			l := NewLineage(tc.entries)
			got := l.Of(agent, tc.selectors, now)
			if names(got) != tc.want {
				t.Errorf("got %q, want %q", names(got), tc.want)
			}
			for _, e := range tc.entries {
				want := slices.ContainsFunc(got, func(g Entry) bool { return g.SPIFFEID == e.SPIFFEID })
				if l.Gives(agent, tc.selectors, e.SPIFFEID, now) != want {
					t.Errorf("Gives %s = %t", e.SPIFFEID, !want)
				}
			}
		})
	}
}

func TestALineageSaysWhenSomethingMayBeLost(t *testing.T) {
	cn := func(name string) Selector { return Selector{"x509pop", "subject:cn:" + name} }
	old := []Entry{below("/spire/server", "/web", cn("web"), cn("x")), below("/web", "/a"), below("/spire/agent/x509pop/1", "/b")}
	for _, tc := range []struct {
		name  string
		next  func([]Entry) []Entry
		keeps bool
	}{
		{"nothing changes", func(e []Entry) []Entry { return e }, true},
		{"another order", func(e []Entry) []Entry { slices.Reverse(e); slices.Reverse(e[2].Selectors); return e }, true},
		{"one more", func(e []Entry) []Entry { return append(e, below("/web", "/c")) }, true},
		{"an alias is gone", func(e []Entry) []Entry { return e[1:] }, false},
		{"an alias asks for more", func(e []Entry) []Entry { e[0].Selectors = append(e[0].Selectors, cn("y")); return e }, false},
		{"a child of an alias is gone", func(e []Entry) []Entry { return slices.Delete(e, 1, 2) }, false},
		{"a child has moved", func(e []Entry) []Entry { e[2].ParentID = e[1].ParentID; return e }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			next := slices.Clone(old)
			next[0].Selectors = slices.Clone(next[0].Selectors)
			if got := NewLineage(tc.next(next)).Keeps(NewLineage(slices.Clone(old))); got != tc.keeps {
				t.Errorf("Keeps = %t, want %t", got, tc.keeps)
			}
		})
	}
}

// FuzzLineage makes a small world of its input and asks the plain definition: an
// entry is an agent's when the way up its parents ends at the agent, or at an
// alias of which it has all selectors.
func FuzzLineage(f *testing.F) {
	for seed := range byte(32) {
		b := make([]byte, 40)
		rand.NewChaCha8([32]byte{seed}).Read(b)
		f.Add(b)
	}
	parents := []string{"/spire/server", "/spire/agent/k/1", "/spire/agent/k/2", "/w0", "/w1", "/w2", "/w3", "/w4"}
	facts := []Selector{{"oidc", "a:1"}, {"oidc", "a:2"}, {"oidc", "a:3"}, {"spiffe_id", "spiffe://corp.example/spire/agent/k/1"}}
	some := func(bits byte) (out []Selector) {
		for i, s := range facts {
			if bits>>i&1 == 1 {
				out = append(out, s)
			}
		}
		return out
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 60 {
			return
		}
		agent, has := spiffeid.RequireFromPath(corp, parents[1+in[0]>>7]), some(in[0]&7)
		var es []Entry
		for i := 1; i+1 < len(in); i += 2 {
			e := below(parents[in[i]&7], parents[3+in[i]>>3&3])
			e.ID = string(rune('A' + i))
			if e.IsAlias() {
				e.Selectors = some(in[i+1] & 15)
			}
			es = append(es, e)
		}
		held := append(slices.Clone(has), Selector{"spiffe_id", agent.String()})
		mine := map[spiffeid.ID]bool{agent: true}
		for range es { // as many rounds as the longest way
			for _, e := range es {
				lacks := len(e.Selectors) == 0 || slices.ContainsFunc(e.Selectors, func(s Selector) bool { return !slices.Contains(held, s) })
				if e.IsAlias() && !lacks || !e.IsAlias() && mine[e.ParentID] {
					mine[e.SPIFFEID] = true
				}
			}
		}
		var want []string
		for _, e := range es {
			if !e.IsAlias() && mine[e.ParentID] {
				want = append(want, e.ID)
			}
		}
		got := strings.Fields(names(NewLineage(es).Of(agent, has, time.Now())))
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q of %+v", got, want, es)
		}
	})
}
