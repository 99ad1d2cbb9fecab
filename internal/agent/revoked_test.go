package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

func TestRevocationsArriveAndOutliveTheIssuer(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	p := is.newProxy(dir, is.token("node-b")).join()
	peer := mesh.Issued{Serial: "abcdef", ID: second, Entry: "e", Until: time.Now().Add(time.Hour)}
	if err := is.registry.RecordIssued(t.Context(), []mesh.Issued{peer}); err != nil {
		t.Fatal(err)
	}
	p.settle(is)
	before := p.rejudged.Load()
	res, err := is.registry.Revoke(t.Context(), mesh.RevokeOrder{Serial: "abcdef"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return len(p.Source().Revoked()) == 1 && p.rejudged.Load() > before })
	await(t, func() bool {
		ps := is.registry.Proxies()
		return len(ps) == 1 && ps[0].Revoked == res.Revision
	})
	before = p.rejudged.Load()
	p.OnRevoked(t.Context(), p.Source().Revoked())
	if p.rejudged.Load() != before {
		t.Error("what is known already was acted on again")
	}
	want := p.Source().Revoked()
	p.stop()
	is.stop()
	again := is.newProxy(dir, "")
	got := again.Source().Revoked()
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(spiffeid.ID{})); d != "" {
		t.Errorf("a restart without issuer remembers (-want +got):\n%s", d)
	}
	again.client.Close()
	if err := os.WriteFile(filepath.Join(dir, revokedFile), []byte(`[{"serial":"x"}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(p.cfg); err == nil || !strings.Contains(err.Error(), revokedFile) {
		t.Errorf("a damaged file was passed over: %v", err)
	}
}

func TestAnOwnRevokedSVIDIsReplaced(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), is.token("node-b")).join()
	self, err := p.Self()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := is.registry.Revoke(context.Background(), mesh.RevokeOrder{Serial: mesh.SerialText(self.Chain[0].SerialNumber)}); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool {
		now, err := p.Self()
		return err == nil && !now.Chain[0].Equal(self.Chain[0]) && !p.Source().HoldsRevoked()
	})
	// With its entry gone there is none.
	is.apply("entries: []\n", "")
	await(t, func() bool {
		_, err := p.Self()
		return errors.Is(err, svid.ErrNoIdentity)
	})
}
