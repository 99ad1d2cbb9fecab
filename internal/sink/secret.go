package sink

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// A Secret says where a credential is; it is never in the configuration itself.
type Secret struct {
	// File holds the credential and nothing else. Only its owner may read it
	// (mode 0600 or 0400). It is read anew when it is used.
	File string `yaml:"file"`
	// Env names an environment variable that holds it.
	Env string `yaml:"env"`
}

func (s Secret) validate() error {
	if s.File != "" && s.Env != "" {
		return errors.New("file and env are both given; write one")
	}
	return nil
}

// maxSecret is more than any key or token has, bytes.
const maxSecret = 64 << 10

// read returns the credential, empty when none is configured.
func (s Secret) read() (string, error) {
	if s.Env != "" {
		v := os.Getenv(s.Env)
		if v == "" {
			return "", fmt.Errorf("environment variable %s is empty", s.Env)
		}
		return v, nil
	}
	if s.File == "" {
		return "", nil
	}
	b, err := readPrivate(s.File)
	if err != nil {
		return "", err
	}
	v := strings.TrimSpace(string(b))
	if v == "" {
		return "", fmt.Errorf("%s is empty", s.File)
	}
	return v, nil
}

// readPrivate reads a file that nobody but its owner may.
func readPrivate(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	if m := st.Mode().Perm(); m&0o077 != 0 {
		return nil, fmt.Errorf("%s may be read by others (mode %04o); chmod 0600 it", path, m)
	}
	return io.ReadAll(io.LimitReader(f, maxSecret))
}

// TLS says how the peer is known, and how it knows us.
type TLS struct {
	// CA is a PEM file with the authorities of the server. Default: those of
	// the system.
	CA string `yaml:"ca"`
	// Cert and Key are PEM files of a client certificate, read anew for each
	// connection.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// SVID shows the program's own X.509-SVID as client certificate.
	SVID bool `yaml:"svid"`
}

func (t TLS) validate() error {
	var errs []error
	if (t.Cert == "") != (t.Key == "") {
		errs = append(errs, errors.New("cert: belongs to key; write both or neither"))
	}
	if t.SVID && t.Cert != "" {
		errs = append(errs, errors.New("svid: and cert are both given; write one"))
	}
	return errors.Join(errs...)
}

// config reads the files; a mistake in them is found at the start.
func (t TLS) config(env Env) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca: %s holds no certificate", t.CA)
		}
	}
	own := env.Identity
	if t.Cert != "" {
		own = t.pair
		if _, err := own(); err != nil {
			return nil, fmt.Errorf("cert: %w", err)
		}
	}
	switch {
	case t.SVID && own == nil:
		return nil, errors.New("svid: this program has no SVID of its own; give cert and key")
	case t.SVID || t.Cert != "":
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own() }
	}
	return conf, nil
}

func (t TLS) pair() (*tls.Certificate, error) {
	cert, err := os.ReadFile(t.Cert)
	if err != nil {
		return nil, err
	}
	key, err := readPrivate(t.Key)
	if err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s, %s: %w", t.Cert, t.Key, err)
	}
	return &c, nil
}
