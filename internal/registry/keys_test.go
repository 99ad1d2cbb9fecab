package registry_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/registry"
)

// TestKeysOfADownstreamIssuer counts while an entry says that it is one.
func TestKeysOfADownstreamIssuer(t *testing.T) {
	in := start(t)
	in.apply(policies())
	key := func(kid string) registry.Key {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return registry.Key{KeyID: kid, PublicKey: k.Public(), ExpiresAt: time.Now().Add(time.Hour).Truncate(time.Second)}
	}
	e := entryOf("edge", "/ns/edge/sa/issuer", "node-e", "unix:uid:9")
	e.Downstream = true
	owner, one := e.SPIFFEID.String(), key("one")
	if err := in.AddKey(t.Context(), owner, one); err != nil {
		t.Fatal(err)
	}
	if got := in.Keys(); len(got) != 0 {
		t.Errorf("without an entry there are %+v", got)
	}
	in.edit(create(e))
	if err := in.AddKey(t.Context(), owner, one); err != nil {
		t.Errorf("the same again: %v", err)
	}
	in.restart()
	if got := in.Keys(); len(got) != 1 || got[0].KeyID != "one" || !got[0].ExpiresAt.Equal(one.ExpiresAt) {
		t.Errorf("after a restart there are %+v", got)
	}
	if err := in.AddKey(t.Context(), owner, key("one")); !errors.Is(err, mesh.ErrExists) {
		t.Errorf("another key of the same ID: %v", err)
	}
	if err := in.AddKey(t.Context(), id("/ns/edge/sa/other").String(), one); !errors.Is(err, mesh.ErrExists) {
		t.Errorf("another's key: %v", err)
	}
	for n := range 15 {
		if err := in.AddKey(t.Context(), owner, key("more-"+string(rune('a'+n)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.AddKey(t.Context(), owner, key("too-many")); !errors.Is(err, registry.ErrManyKeys) {
		t.Errorf("the 17th key: %v", err)
	}
	in.edit(mesh.EntryEdit{ID: "edge", Delete: true})
	if got := in.Keys(); len(got) != 0 {
		t.Errorf("after its entry is gone there are %+v", got)
	}
	// An entry that is made again is not for the keys of before.
	in.edit(create(e))
	if got := in.Keys(); len(got) != 0 {
		t.Errorf("with a new entry there are %+v", got)
	}
	again := key("again")
	if err := in.AddKey(t.Context(), owner, again); err != nil {
		t.Fatal(err)
	}
	e.Downstream = false
	in.edit(mesh.EntryEdit{ID: "edge", Delete: true})
	in.edit(create(e))
	e.Downstream = true
	in.edit(mesh.EntryEdit{ID: "edge", Delete: true})
	in.edit(create(e))
	if got := in.Keys(); len(got) != 0 {
		t.Errorf("after it was none for a while there are %+v", got)
	}
}
