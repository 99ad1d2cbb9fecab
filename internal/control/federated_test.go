package control

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"sallyport/internal/mesh"
)

func TestFederatedBundles(t *testing.T) {
	far := spiffeid.RequireTrustDomainFromString("far.example")
	gone := spiffeid.RequireTrustDomainFromString("gone.example")
	theirs := newCA(t, far)
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.Federated = func(of spiffeid.TrustDomain) (FederatedBundle, bool) {
			switch of {
			case far:
				return FederatedBundle{X509: theirs.X509Bundle(), JWT: theirs.JWTKeys(), RefreshHint: time.Minute, Sequence: 3}, true
			case gone: // it has revoked all its keys
				return FederatedBundle{}, true
			}
			return FederatedBundle{}, false
		}
	})
	r.reg.entries[0].FederatesWith = []spiffeid.TrustDomain{far}
	c, _ := r.joined("node-a")
	b, err := c.GetFederatedBundle(t.Context(), far)
	if err != nil || len(b.X509) != 1 || !b.X509[0].Equal(theirs.X509Bundle()[0]) || len(b.JWT) != len(theirs.JWTKeys()) || b.RefreshHint != time.Minute {
		t.Errorf("got %+v, %v", b, err)
	}
	if b, err := c.GetFederatedBundle(t.Context(), gone); err != nil || len(b.X509) != 0 {
		t.Errorf("a revoked trust domain: %+v, %v", b, err)
	}
	for _, other := range []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.example"), td} {
		if _, err := c.GetFederatedBundle(t.Context(), other); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v, want ErrRefused", other, err)
		}
	}
	es, err := c.SyncEntries(t.Context())
	if err != nil || len(es) == 0 || len(es[0].FederatesWith) != 1 || es[0].FederatesWith[0] != far {
		t.Errorf("entries: %+v, %v", es, err)
	}
	if _, err := entryFromWire(entryToWire(mesh.Entry{ID: "e"}, 0)); err == nil {
		t.Error("an entry without identity was read")
	}
}

func TestDomainMatch(t *testing.T) {
	a, b, c := spiffeid.RequireTrustDomainFromString("a.example"), spiffeid.RequireTrustDomainFromString("b.example"), spiffeid.RequireTrustDomainFromString("c.example")
	have := map[string][]spiffeid.TrustDomain{"none": nil, "a": {a}, "ab": {a, b}, "abc": {a, b, c}, "c": {c}}
	for kind, want := range map[types.FederatesWithMatch_MatchBehavior]string{
		types.FederatesWithMatch_MATCH_EXACT: "ab", types.FederatesWithMatch_MATCH_SUBSET: "a ab",
		types.FederatesWithMatch_MATCH_SUPERSET: "ab abc", types.FederatesWithMatch_MATCH_ANY: "a ab abc",
	} {
		match, err := domainMatch("f", &types.FederatesWithMatch{TrustDomains: []string{"a.example", "b.example"}, Match: kind})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, name := range []string{"none", "a", "ab", "abc", "c"} {
			if match(have[name]) {
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", kind, got, want)
		}
	}
	for _, bad := range []*types.FederatesWithMatch{{}, {TrustDomains: []string{"A b"}}, {TrustDomains: []string{"a"}, Match: 99}} {
		if _, err := domainMatch("f", bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}
