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
	text := b64([]byte(m.header)) + "." + b64(fmt.Appendf(nil, `{"sub":%q,"aud":[%q],"iat":%d,"exp":%d}`, id, aud[0], now, now+60))
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

// serve runs our Workload API and gives its socket.
func serve(t *testing.T, entries everybody, header string) string {
	t.Helper()
	ca := meshtest.NewCA(t, meshtest.TD)
	m := minter{meshtest.NewKey(t), header}
	src := svid.NewSource()
	err := src.Set(&svid.State{
		Bundle: ca.Bundle(), JWTKeys: map[string]crypto.PublicKey{"k": m.key.Public()},
		Identities: []svid.Identity{meshtest.Identity(t, ca, meshtest.ID("/a")), meshtest.Identity(t, ca, meshtest.ID("/b"))},
	})
	if err != nil {
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
	got, err := WorkloadAPI(t.Context(), serve(t, everybody{"entry/a", "entry/b"}, `{"alg":"ES256","kid":"k","typ":"JWT"}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range got {
		if v.Err != nil || v.Skipped != "" {
			t.Errorf("%d %s: %v %s", v.Must, v.Name, v.Err, v.Skipped)
		}
	}
	if len(got) < 25 {
		t.Errorf("only %d demands were looked at", len(got))
	}
}

func TestATokenWithAStrangeHeaderIsFound(t *testing.T) {
	got, err := WorkloadAPI(t.Context(), serve(t, everybody{"entry/a"}, `{"alg":"ES256","kid":"k","jku":"https://x"}`))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, v := range got {
		found = found || v.Must == 41 && v.Err != nil
	}
	if !found {
		t.Error("the header jku was not noticed")
	}
}

func TestWithoutIdentityNothingIsSaid(t *testing.T) {
	if _, err := WorkloadAPI(t.Context(), serve(t, nil, "")); err == nil || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("got %v", err)
	}
	if _, err := WorkloadAPI(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a socket that is not there answered")
	}
}
