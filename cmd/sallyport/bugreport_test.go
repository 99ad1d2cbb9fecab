package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestScrub hides secrets of every kind in a text, and keeps what helps.
func TestScrub(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	invitation, err := nobody().text()
	if err != nil {
		t.Fatal(err)
	}
	passphrase := filepath.Join(t.TempDir(), "ca.passphrase")
	if err := os.WriteFile(passphrase, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var s scrubber
	s.learn(passphrase)
	for name, secret := range map[string]string{
		"a private key":                block,
		"a private key that is cut":    block[:len(block)/2],
		"a private key in base64":      base64.StdEncoding.EncodeToString(der),
		"a join token":                 nobody().Token,
		"an invitation":                invitation,
		"a JWT":                        "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
		"a password in a URL":          "hunter2hunter2",
		"a passphrase that is known":   "correct horse battery",
		"a field of a header":          "c2Vzc2lvbg",
		"a key of age":                 "AGE-SECRET-KEY-1QQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQ",
		"a value that is named secret": "topsecretvalue",
	} {
		form := map[string]string{
			"a password in a URL":          "url: postgres://issuer:" + secret + "@db:5432/x",
			"a field of a header":          "Authorization: Bearer-" + secret,
			"a value that is named secret": `{"client_secret": "` + secret + `"}`,
		}[name]
		if form == "" {
			form = "before " + secret + " after"
		}
		got := s.scrub(form)
		if strings.Contains(got, secret) || strings.Contains(got, secret[:len(secret)/2+1]) {
			t.Errorf("%s is left in %q", name, got)
		}
		if !strings.Contains(got, removed) {
			t.Errorf("%s left no mark in %q", name, got)
		}
	}
	const useful = "not ready: svid: waiting for spiffe://corp.example/ns/default/sa/web at 10.0.0.7:15006, revision 12, sallyport_connections{state=\"open\"} 3"
	if got := s.scrub(useful); got != useful {
		t.Errorf("what helps was taken out: %q", got)
	}
}
