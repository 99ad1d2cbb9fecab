package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
)

// An invitation is all that a new node must know of a trust domain: where its
// issuers are, by the hash of which roots they are known, and the join token.
type invitation struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	Issuers     []string             `json:"issuers"`
	// Roots are SHA-256 sums of root certificates, in hex.
	Roots []string `json:"roots"`
	Agent string   `json:"agent"`
	Token string   `json:"token"`
}

const (
	// invitationBegins tells the form of an invitation, and its version.
	invitationBegins = "spjoin1_"
	maxInvitation    = 8 << 10 // bytes; one with a root and an issuer has 400
	mostInvited      = 16      // issuers, and roots
)

var agentName = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,128}$`)

// text is the invitation as people carry it. It is a secret.
func (i invitation) text() (string, error) {
	if err := i.validate(); err != nil {
		return "", err
	}
	b, err := json.Marshal(i)
	return invitationBegins + base64.RawURLEncoding.EncodeToString(b), err
}

// readInvitation reads what text wrote. No error shows a part of it.
func readInvitation(text string) (i invitation, err error) {
	bad := errors.New("this is no invitation, or not a whole one; copy what sallyport token create NODE --join HOST:PORT has printed")
	rest, ok := strings.CutPrefix(strings.TrimSpace(text), invitationBegins)
	if !ok || len(text) > maxInvitation {
		return i, bad
	}
	b, err := base64.RawURLEncoding.DecodeString(rest)
	if err != nil {
		return i, bad
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&i); err != nil {
		return invitation{}, bad
	}
	if _, err := d.Token(); err != io.EOF {
		return invitation{}, bad
	}
	if err := i.validate(); err != nil {
		return invitation{}, fmt.Errorf("the invitation: %w", err)
	}
	return i, nil
}

// validate holds what goes into configuration files to what it must be.
func (i invitation) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if i.TrustDomain.IsZero() {
		bad("names no trust domain")
	}
	if !agentName.MatchString(i.Agent) || strings.Trim(i.Agent, ".") == "" {
		bad("%q is not an agent name", i.Agent)
	}
	if b, err := hex.DecodeString(i.Token); err != nil || len(b) < 16 || len(b) > 64 {
		bad("has no join token")
	}
	if n := len(i.Issuers); n < 1 || n > mostInvited {
		bad("names %d issuers, want 1 to %d", n, mostInvited)
	}
	for _, a := range i.Issuers {
		if err := checkDial(a); err != nil {
			errs = append(errs, err)
		}
	}
	if n := len(i.Roots); n < 1 || n > mostInvited {
		bad("has %d fingerprints, want 1 to %d", n, mostInvited)
	}
	for _, r := range i.Roots {
		if b, err := hex.DecodeString(r); err != nil || len(b) != sha256.Size {
			bad("has a fingerprint that is no SHA-256 in hex")
		}
	}
	return errors.Join(errs...)
}

var plainHost = regexp.MustCompile(`^[A-Za-z0-9.:_-]+$`)

// checkDial says why an address cannot be dialled by name and number.
func checkDial(a string) error {
	host, port, err := net.SplitHostPort(a)
	n, errPort := strconv.ParseUint(port, 10, 16)
	if err != nil || errPort != nil || n == 0 || !plainHost.MatchString(host) {
		return fmt.Errorf("%q is not host:port, such as issuer.corp.example:8443", a)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("%q is no address that others can dial; name the machine", a)
	}
	return nil
}

// fingerprints are the sums of the roots of a bundle that are to last.
func fingerprints(b control.Bundle) (sums []string) {
	tainted := map[string]bool{}
	for _, c := range b.Tainted {
		tainted[string(c.Raw)] = true
	}
	for _, c := range b.X509 {
		if !tainted[string(c.Raw)] {
			sum := sha256.Sum256(c.Raw)
			sums = append(sums, hex.EncodeToString(sum[:]))
		}
	}
	return sums
}

// introduction is how to meet the issuer.
func (i invitation) introduction() control.Introduction {
	in := control.Introduction{Addresses: i.Issuers, TrustDomain: i.TrustDomain}
	for _, r := range i.Roots {
		b, _ := hex.DecodeString(r) // validate has seen it
		in.Roots = append(in.Roots, [sha256.Size]byte(b))
	}
	return in
}

// quotedList is a list of YAML in one line, without its brackets.
func quotedList(all []string) string {
	out := make([]string, len(all))
	for i, s := range all {
		out[i] = strconv.Quote(s)
	}
	return strings.Join(out, ", ")
}
