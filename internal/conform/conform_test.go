package conform

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"crypto/x509"

	"sallyport/internal/capture"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

// everybody is entitled to the same entries.
type everybody []string

func (e everybody) Attest(context.Context, capture.Process) ([]string, error) { return e, nil }

// A minter signs ES256. Its header is what a test makes it.
type minter struct {
	key    *ecdsa.PrivateKey
	header string
}

func (m minter) MintJWT(_ context.Context, entryID string, aud []string) (string, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	now := time.Now().Unix()
	id := meshtest.ID(strings.TrimPrefix(entryID, "entry"))
	text := b64([]byte(m.header)) + "." + b64(fmt.Appendf(nil, `{"sub":%q,"aud":["%s"],"iat":%d,"exp":%d}`, id, strings.Join(aud, `","`), now, now+60))
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, m.key, sum[:])
	if err != nil {
		return "", err
	}
	var sig [64]byte
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return text + "." + b64(sig[:]), nil
}

// newDomain makes a trust domain to federate with.
func newDomain(t *testing.T) *Domain {
	t.Helper()
	d, err := NewDomain(spiffeid.RequireTrustDomainFromString("conform.example"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// serve runs our Workload API and gives its socket.
func serve(t *testing.T, entries everybody, header string, d *Domain) string {
	t.Helper()
	ca := meshtest.NewCA(t, meshtest.TD)
	m := minter{meshtest.NewKey(t), header}
	a, b := meshtest.Identity(t, ca, meshtest.ID("/a")), meshtest.Identity(t, ca, meshtest.ID("/b"))
	st := &svid.State{
		Bundle: ca.Bundle(), JWTKeys: map[string]crypto.PublicKey{"k": m.key.Public()},
		Identities: []svid.Identity{a, b},
	}
	if d != nil {
		for i := range st.Identities {
			st.Identities[i].FederatesWith = []spiffeid.TrustDomain{d.td}
		}
		st.Federated = map[spiffeid.TrustDomain]*x509bundle.Bundle{d.td: x509bundle.FromX509Authorities(d.td, []*x509.Certificate{d.root})}
		st.FederatedJWT = map[spiffeid.TrustDomain]map[string]crypto.PublicKey{d.td: {}}
		for _, kid := range []string{kidES256, kidES384, kidRSA} {
			st.FederatedJWT[d.td][kid] = d.jwt[kid].Public()
		}
	}
	src := svid.NewSource()
	if err := src.Set(st); err != nil {
		t.Fatal(err)
	}
	w, err := svid.NewWorkloadAPI(svid.WorkloadConfig{Source: src, Attest: entries, JWT: m, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := capture.ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestOursConforms(t *testing.T) {
	d := newDomain(t)
	got, err := RunWorkload(t.Context(), Workload{Address: serve(t, everybody{"entry/a", "entry/b"}, `{"alg":"ES256","kid":"k","typ":"JWT"}`, d), Domain: d})
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for _, v := range got {
		if v.Err != nil {
			t.Errorf("%d %s: %v", v.Must.Number, v.Must.Says, v.Err)
		}
		if v.Looks > 0 {
			passed++
		} else if v.Skipped == "" {
			t.Errorf("%d %s: neither looked at nor said why not", v.Must.Number, v.Must.Says)
		}
		t.Logf("%d %d %s", v.Must.Number, v.Looks, v.Skipped)
	}
	if passed < 60 || len(got) != 134 {
		t.Errorf("only %d demands of %d were looked at", passed, len(got))
	}
}

func TestATokenWithAStrangeHeaderIsFound(t *testing.T) {
	got, err := RunWorkload(t.Context(), Workload{Address: serve(t, everybody{"entry/a"}, `{"alg":"ES256","kid":"k","jku":"https://x"}`, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if got[40].Err == nil {
		t.Error("the header jku was not noticed")
	}
}

func TestWithoutIdentityNothingIsSaid(t *testing.T) {
	if _, err := RunWorkload(t.Context(), Workload{Address: serve(t, nil, "", nil)}); err == nil || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("got %v", err)
	}
	if _, err := RunWorkload(t.Context(), Workload{Address: filepath.Join(t.TempDir(), "none")}); err == nil {
		t.Error("a socket that is not there answered")
	}
}
