package registry_test

import (
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/registry"
)

var far = spiffeid.RequireTrustDomainFromString("far.example")

func TestFederationsMadeByCallsAreKept(t *testing.T) {
	in := start(t)
	made := registry.Federation{TrustDomain: far, URL: "https://far.example", Profile: "https_spiffe",
		EndpointID: spiffeid.RequireFromString("spiffe://far.example/x"), Bundle: []byte("doc"), Given: time.Unix(1e9, 0).UTC()}
	changed := in.FederationsChanged()
	err := in.EditFederation(t.Context(), far, func(old registry.Federation) (registry.Federation, error) {
		if !old.TrustDomain.IsZero() {
			t.Errorf("before there was %+v", old)
		}
		return made, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was woken")
	}
	in.restart()
	got := in.Federations()
	if len(got) != 1 || got[0].URL != made.URL || got[0].EndpointID != made.EndpointID || string(got[0].Bundle) != "doc" || !got[0].Given.Equal(made.Given) {
		t.Errorf("after a restart there is %+v", got)
	}
	no := errors.New("no")
	if err := in.EditFederation(t.Context(), far, func(registry.Federation) (registry.Federation, error) { return registry.Federation{}, no }); !errors.Is(err, no) {
		t.Errorf("got %v, want the error of the change", err)
	}
	forget := func(registry.Federation) (registry.Federation, error) { return registry.Federation{}, nil }
	for range 2 {
		if err := in.EditFederation(t.Context(), far, forget); err != nil || len(in.Federations()) != 0 {
			t.Errorf("forgotten: %v, left %+v", err, in.Federations())
		}
	}
}

func sharedFederations(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	put := func(m *member, url string) {
		err := m.EditFederation(f.t.Context(), far, func(old registry.Federation) (registry.Federation, error) {
			old.TrustDomain, old.URL = far, url
			return old, nil
		})
		if err != nil {
			f.t.Fatal(err)
		}
	}
	changed := b.FederationsChanged()
	put(a, "https://one.example")
	<-changed
	put(b, "https://two.example")
	if got := b.Federations(); len(got) != 1 || got[0].URL != "https://two.example" {
		f.t.Errorf("b has %+v", got)
	}
	// a may not know of the change yet: it tries again on what it reads then.
	put(a, "https://three.example")
	f.eventually("b follows a", func() bool {
		got := b.Federations()
		return len(got) == 1 && got[0].URL == "https://three.example"
	})
}
