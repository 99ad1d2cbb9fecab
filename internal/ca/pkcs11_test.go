//go:build cgo

package ca

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"sallyport/internal/meshtest"
)

const (
	softHSM = "/usr/lib/softhsm/libsofthsm2.so"
	userPIN = "28439105"
)

// softTokens is the directory of all tests' tokens: the module is loaded once a
// process and reads its configuration then.
var softTokens = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "softhsm-")
	if err != nil {
		return "", err
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", dir)
	return dir, errors.Join(os.WriteFile(conf, []byte(text), 0o600), os.Setenv("SOFTHSM2_CONF", conf))
})

// tokens counts those made, since each needs a label of its own.
var tokens atomic.Int32

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := softTokens(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// softToken makes a token for the test.
func softToken(t *testing.T) (uri string) {
	t.Helper()
	tool := meshtest.Need(t, "softhsm2-util")
	if _, err := softTokens(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("token-%d", tokens.Add(1))
	out, err := exec.Command(tool, "--init-token", "--free", "--label", name, "--so-pin", "91827364", "--pin", userPIN).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pin := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pin, []byte(userPIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return "pkcs11:module-path=" + softHSM + ";token=" + name + "?pin-source=" + pin
}

func TestPKCS11KeysStay(t *testing.T) {
	cfg := config(t)
	cfg.KMS = softToken(t)
	now := time.Now()
	cfg.Now = func() time.Time { return now }
	c := open(t, cfg)
	chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	verify(t, chain, c.Bundle().X509)
	token, _, _, err := c.SignJWT(t.Context(), web, []string{"db"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwt.Parse(token, func(*jwt.Token) (any, error) { return c.Bundle().JWT[0].PublicKey, nil }); err != nil {
		t.Error(err)
	}
	if keys := must1(filepath.Glob(filepath.Join(cfg.Dir, "*.key"))); len(keys) > 0 {
		t.Errorf("there are key files: %v", keys)
	}
	store := c.keys.(*tokenKeys)
	root := must1(store.load(rootName))
	if _, err := x509.MarshalPKCS8PrivateKey(crypto.PrivateKey(root)); err == nil {
		t.Error("the key can be had")
	}
	// The intermediate and its key are replaced, and the old key leaves.
	old := c.state.Intermediate
	now = now.Add(6 * 24 * time.Hour)
	if err := c.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if there, err := store.has(old); there || err != nil || c.state.Intermediate == old {
		t.Errorf("old key there: %v, %v", there, err)
	}
	verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), c.Bundle().X509)
	serial := c.Status().IntermediateSerial
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, cfg)
	if again.Status().IntermediateSerial != serial {
		t.Error("another intermediate after a restart")
	}
	verify(t, issue(t, again, X509Request{ID: web, PublicKey: anyKey.Public()}), again.Bundle().X509)
}

func TestPKCS11Refuses(t *testing.T) {
	uri := softToken(t)
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("77777777\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	base, _, _ := strings.Cut(uri, "?")
	for _, tt := range []struct{ name, kms, want string }{
		{"a wrong PIN", base + "?pin-source=" + wrong, "the token refused the PIN"},
		{"another token", "pkcs11:module-path=" + softHSM + ";token=none?pin-value=77777777", "there is no such token"},
		{"another module", "pkcs11:module-path=/none.so;token=a?pin-value=77777777", "the PKCS#11 module does not load"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(t)
			cfg.KMS = tt.kms
			_, err := Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "77777777") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestPKCS11KeyAbsent opens a CA whose token lost a key.
func TestPKCS11KeyAbsent(t *testing.T) {
	cfg := config(t)
	cfg.KMS = softToken(t)
	c := open(t, cfg)
	name := c.state.Intermediate
	if err := errors.Join(c.keys.remove(name), c.Close()); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), cfg)
	if want := "ca.kms: key sallyport-" + name + " in the token is missing"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

func TestPKCS11TwoCAs(t *testing.T) {
	one, two := config(t), config(t)
	one.KMS = softToken(t)
	two.KMS = one.KMS
	a := open(t, one)
	if _, err := Open(t.Context(), two); err == nil || !strings.Contains(err.Error(), "ca.kms: key sallyport-root in the token is there") {
		t.Errorf("got %v", err)
	}
	two.KMS = strings.Replace(two.KMS, "?", ";object=second?", 1)
	b := open(t, two)
	if slices.ContainsFunc(b.Bundle().X509, a.Bundle().X509[0].Equal) {
		t.Error("they share a root")
	}
	issue(t, a, X509Request{ID: web, PublicKey: anyKey.Public()})
	issue(t, b, X509Request{ID: web, PublicKey: anyKey.Public()})
}
