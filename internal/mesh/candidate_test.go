package mesh

import (
	"slices"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// tryFolder is a policy folder with these files.
func tryFolder(t *testing.T, files map[string]string) *Policies {
	t.Helper()
	m := fstest.MapFS{}
	for name, text := range files {
		m[name] = &fstest.MapFile{Data: []byte(text)}
	}
	p, err := ParseFS(m, demoDomain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const (
	tryAB    = "p, a-b, in, spiffe://demo.sallyport/a, spiffe://demo.sallyport/b, 1, GET, /x, -, allow\n"
	tryCB    = "p, c-b, in, spiffe://demo.sallyport/c, spiffe://demo.sallyport/b, 1, GET, /x, -, allow\n"
	tryOut   = "p, a-out, out, spiffe://demo.sallyport/a, host:api.example, 443, CONNECT, -, -, allow\n"
	tryGuard = "p, guard-1, in, **, spiffe://demo.sallyport/b, *, *, /admin/**, -, deny\n"
)

func ids(rules []Rule) (out []string) {
	for _, r := range rules {
		out = append(out, r.ID)
	}
	return out
}

func TestACandidateReplacesTheFilesItHas(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"rows alone":       {map[string]string{"candidate/access.csv": tryCB}, []string{"c-b", "guard-1"}},
		"guardrails alone": {map[string]string{"candidate/guardrails.csv": "# none\n"}, []string{"a-b"}},
		"both":             {map[string]string{"candidate/access.csv": tryCB, "candidate/guardrails.csv": "# none\n"}, []string{"c-b"}},
		"an empty one":     {map[string]string{"candidate/access.csv": ""}, []string{"guard-1"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.files["access.csv"], c.files["guardrails.csv"] = tryAB, tryGuard
			p := tryFolder(t, c.files)
			if got := ids(p.WithCandidate().Rules); !slices.Equal(got, c.want) {
				t.Errorf("candidate has %v, want %v", got, c.want)
			}
			if got := ids(p.Rules); !slices.Equal(got, []string{"a-b", "guard-1"}) {
				t.Errorf("in force is %v", got)
			}
		})
	}
}

func TestTheHashCoversTheCandidate(t *testing.T) {
	plain := tryFolder(t, map[string]string{"access.csv": tryAB})
	with := tryFolder(t, map[string]string{"access.csv": tryAB, "candidate/access.csv": tryCB})
	moved := tryFolder(t, map[string]string{"access.csv": tryAB, "candidate/access.csv": "# why\n\n" + tryCB})
	other := tryFolder(t, map[string]string{"access.csv": tryAB, "candidate/access.csv": tryAB})
	if plain.WithCandidate() != nil || plain.Hash() == with.Hash() || with.Hash() == other.Hash() || with.Hash() != moved.Hash() {
		t.Error("the hash does not tell candidates apart, or tells comments apart")
	}
	again, err := DecodePolicies(with.Encode())
	if err != nil || again.Hash() != with.Hash() {
		t.Errorf("the candidate was lost in the store: %v", err)
	}
}

// What a proxy gets of the candidate is what it would get of the rows in force,
// and that is not touched.
func TestTheCandidateIsProjected(t *testing.T) {
	p := tryFolder(t, map[string]string{"access.csv": tryAB + tryOut, "candidate/access.csv": tryCB + tryOut})
	snap, err := Compile(p, 7, 3, nil)
	if err != nil {
		t.Fatal(err)
	}
	bare := *p
	bare.Candidate = nil
	without, err := Compile(&bare, 7, 3, nil)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string][]string{"/a": {"a-out"}, "/b": {"c-b"}, "/c": {"c-b"}, "/d": nil} {
		who := spiffeid.RequireFromPath(demoDomain, path)
		own := snap.Project(who)
		if got := ids(own.Candidate.Rules); !slices.Equal(got, want) {
			t.Errorf("%s tries %v, want %v", path, got, want)
		}
		if own.ContentHash() != without.Project(who).ContentHash() {
			t.Errorf("%s: the candidate changes what is in force", path)
		}
		if own.Candidate.PolicyRevision != 3 || own.Candidate.TrustDomain != demoDomain {
			t.Errorf("%s: candidate of revision %d in %q", path, own.Candidate.PolicyRevision, own.Candidate.TrustDomain)
		}
		if back, err := DecodeSnapshot(own.Candidate.Encode()); err != nil || back.ContentHash() != own.Candidate.ContentHash() {
			t.Errorf("%s: the candidate does not travel: %v", path, err)
		}
	}
	if got := ids(snap.ProjectGateway().Candidate.Rules); !slices.Equal(got, []string{"a-out"}) {
		t.Errorf("the gateway tries %v", got)
	}
}
