package main

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// nobody is an invitation to where no issuer is.
func nobody() invitation {
	return invitation{
		TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example"), Issuers: []string{"127.0.0.1:1"},
		Roots: []string{strings.Repeat("ab", 32)}, Agent: "web", Token: strings.Repeat("0f", 32),
	}
}

func TestInvitation(t *testing.T) {
	want := nobody()
	text, err := want.text()
	if err != nil {
		t.Fatal(err)
	}
	got, err := readInvitation(" " + text + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := got.text(); again != text || err != nil {
		t.Errorf("read back as %+v: %v", got, err)
	}
	for name, change := range map[string]func(*invitation){
		"a name that leaves its directory":    func(i *invitation) { i.Agent = ".." },
		"a name with a slash":                 func(i *invitation) { i.Agent = "a/b" },
		"an address with a line feed":         func(i *invitation) { i.Issuers = []string{"a\nb:1"} },
		"an address with a quote":             func(i *invitation) { i.Issuers = []string{`a":1`} },
		"an address without a port":           func(i *invitation) { i.Issuers = []string{"a"} },
		"no address":                          func(i *invitation) { i.Issuers = nil },
		"a short fingerprint":                 func(i *invitation) { i.Roots = []string{"abcd"} },
		"no fingerprint":                      func(i *invitation) { i.Roots = nil },
		"a token that is no token":            func(i *invitation) { i.Token = "x: y" },
		"no token":                            func(i *invitation) { i.Token = "" },
		"no trust domain":                     func(i *invitation) { i.TrustDomain = spiffeid.TrustDomain{} },
		"an address that is nobody's to dial": func(i *invitation) { i.Issuers = []string{"[::]:8443"} },
	} {
		i := nobody()
		change(&i)
		if _, err := i.text(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	whole, _ := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, invitationBegins))
	for name, bad := range map[string]string{
		"text behind it":   text + "!",
		"a second value":   invitationBegins + base64.RawURLEncoding.EncodeToString(append(whole, "{}"...)),
		"an unknown field": invitationBegins + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(whole), "{", `{"x":1,`, 1))),
		"another version":  strings.Replace(text, "spjoin1_", "spjoin2_", 1),
		"a long one":       invitationBegins + strings.Repeat("A", maxInvitation),
	} {
		_, err := readInvitation(bad)
		if err == nil {
			t.Errorf("with %s it is accepted", name)
		} else if strings.Contains(err.Error(), want.Token) {
			t.Errorf("with %s the error shows the token", name)
		}
	}
}

func FuzzInvitation(f *testing.F) {
	text, err := nobody().text()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text string) {
		i, err := readInvitation(text)
		if err != nil {
			return
		}
		if _, err := i.text(); err != nil {
			t.Errorf("was accepted, and cannot be written: %v", err)
		}
	})
}
