package ca

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPKCS11URI(t *testing.T) {
	for _, tt := range []struct{ name, uri, want string }{
		{"no token", "pkcs11:module-path=/m.so?pin-value=123456", "names one of token, serial and slot-id"},
		{"two tokens", "pkcs11:token=a;serial=1?pin-value=123456", "names one of token, serial and slot-id"},
		{"no PIN", "pkcs11:token=a", "without a PIN"},
		{"two PINs", "pkcs11:token=a?pin-value=123456&pin-source=/p", "are both given"},
		{"a relative PIN file", "pkcs11:token=a?pin-source=p", "not an absolute path"},
		{"a prompt", "pkcs11:token=a?pin-prompt=123456", `"pin-prompt" of a PKCS#11 URI is not supported`},
		{"a label that needs escapes", "pkcs11:token=a;object=a%3bb?pin-value=123456", "object is the beginning"},
		{"one attribute twice", "pkcs11:token=a;token=b?pin-value=123456", `"token" is given 2 times`},
		{"a path instead", "pkcs11:///etc/hsm?pin-value=123456", "not a PKCS#11 URI"},
		{"a bad escape", "pkcs11:token=%zz?pin-value=123456", "PKCS#11 URI"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(t)
			cfg.KMS = tt.uri
			err := cfg.Validate()
			if err == nil || !strings.Contains(err.Error(), "ca.kms: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "123456") {
				t.Errorf("the PIN is in %q", err)
			}
		})
	}
	good, err := parsePKCS11("PKCS11:module-path=/m.so;token=my%20token;object=eu-1?pin-source=file:/etc/pin")
	want := token{uri: "pkcs11:module-path=%2Fm.so;token=my+token", label: "eu-1", pinFile: "/etc/pin"}
	if err != nil || good != want {
		t.Errorf("got %+v, %v", good, err)
	}
}

func TestPKCS11Excludes(t *testing.T) {
	cfg := config(t)
	cfg.KMS = "pkcs11:token=a?pin-value=123456"
	cfg.Passphrase = []byte("x")
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "passphrase") {
		t.Errorf("got %v", err)
	}
	cfg.Passphrase, cfg.SharedRoot = nil, true
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "share a root") {
		t.Errorf("got %v", err)
	}
	cfg.RootDir = t.TempDir()
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "ca.root_dir") {
		t.Errorf("got %v", err)
	}
}

func TestPKCS11PINFile(t *testing.T) {
	for _, tt := range []struct {
		name, text, want string
		mode             os.FileMode
	}{
		{"one line", "drowssap\n", "", 0o600},
		{"no end of line", "drowssap", "", 0o400},
		{"a DOS line", "drowssap\r\n", "", 0o600},
		{"empty", "", "does not hold one line", 0o600},
		{"an empty line", "\ndrowssap\n", "does not hold one line", 0o600},
		{"two lines", "drowssap\nother\n", "does not hold one line", 0o600},
		{"endless", strings.Repeat("1", maxPIN+1), "does not hold one line", 0o600},
		{"open to others", "drowssap\n", "lets other users in", 0o640},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "pin")
			if err := os.WriteFile(file, []byte(tt.text), tt.mode); err != nil {
				t.Fatal(err)
			}
			pin, err := token{pinFile: file}.readPIN()
			if tt.want == "" && (err != nil || pin != "drowssap") {
				t.Errorf("got %q, %v", pin, err)
			}
			if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "drowssap")) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := (token{pinFile: filepath.Join(t.TempDir(), "none")}).readPIN(); err == nil || !strings.Contains(err.Error(), "read PIN") {
		t.Errorf("got %v", err)
	}
}
