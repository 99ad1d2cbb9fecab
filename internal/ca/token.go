package ca

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.step.sm/crypto/kms/uri"

	"sallyport/internal/daemon"
)

const (
	pkcs11Scheme = "pkcs11"
	// labelDefault begins the label of each key, so that a person who lists the
	// token knows whose they are.
	labelDefault = "sallyport"
	maxPIN       = 256
)

// labelForm needs no escaping in a URI.
var labelForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// A token is what a pkcs11: URI (RFC 7512) says.
type token struct {
	// uri has no PIN and no label.
	uri   string
	label string
	// pin is empty when pinFile names the file that has it.
	pin, pinFile string
}

func isPKCS11(kms string) bool {
	scheme, _, found := strings.Cut(kms, ":")
	return found && strings.EqualFold(scheme, pkcs11Scheme)
}

// parsePKCS11 reads the URI. No error quotes it: it may hold a PIN.
func parsePKCS11(kms string) (token, error) {
	u, err := uri.ParseWithScheme(pkcs11Scheme, kms)
	if err != nil || u.Opaque == "" {
		return token{}, daemon.Hint(errors.New("not a PKCS#11 URI"), kmsForms)
	}
	t := token{label: labelDefault}
	keep := url.Values{}
	for key, values := range uri.Values(u) {
		if len(values) != 1 {
			return token{}, fmt.Errorf("attribute %q is given %d times", key, len(values))
		}
		switch v := values[0]; key {
		case "module-path", "token", "serial", "slot-id", "max-sessions":
			keep.Set(key, v)
		case "object":
			t.label = v
		case "pin-value":
			t.pin = v
		case "pin-source":
			t.pinFile = strings.TrimPrefix(v, "file:")
		default:
			return token{}, daemon.Hint(fmt.Errorf("attribute %q of a PKCS#11 URI is not supported", key), kmsForms)
		}
	}
	named := slices.DeleteFunc([]string{"token", "serial", "slot-id"}, func(k string) bool { return keep.Get(k) == "" })
	switch {
	case len(named) != 1:
		return token{}, daemon.Hint(fmt.Errorf("a PKCS#11 URI names one of token, serial and slot-id, not %d of them", len(named)), kmsForms)
	case !labelForm.MatchString(t.label):
		return token{}, errors.New("object is the beginning of each key's label: letters, digits, dot, hyphen and underscore, at most 64")
	case t.pin != "" && t.pinFile != "":
		return token{}, errors.New("pin-value and pin-source are both given; want one, best pin-source")
	case t.pin == "" && t.pinFile == "":
		return token{}, daemon.Hint(errors.New("a PKCS#11 URI without a PIN"), "write the user PIN into a file of mode 0600 and append ?pin-source=/that/file")
	case t.pinFile != "" && !filepath.IsAbs(t.pinFile):
		return token{}, errors.New("pin-source is not an absolute path")
	}
	t.uri = uri.New(pkcs11Scheme, keep).String()
	return t, nil
}

// readPIN returns the user PIN.
func (t token) readPIN() (string, error) {
	if t.pin != "" {
		return t.pin, nil
	}
	f, err := os.Open(t.pinFile)
	if err != nil {
		return "", daemon.Hint(fmt.Errorf("read PIN: %w", err), "write the user PIN of the token into it, mode 0600")
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil {
		err = private("PIN file "+t.pinFile, info, "chmod 0600 it, and change the PIN if others were there")
	}
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPIN+1))
	if err != nil {
		return "", fmt.Errorf("read PIN: %w", err)
	}
	line, rest, _ := bytes.Cut(data, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 || len(data) > maxPIN || len(bytes.TrimSpace(rest)) > 0 {
		return "", daemon.Hint(fmt.Errorf("PIN file %s does not hold one line", t.pinFile), "write the user PIN of the token into it, and nothing else")
	}
	return string(line), nil
}
