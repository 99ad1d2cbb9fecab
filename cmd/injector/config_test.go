package main

import (
	"context"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/daemon"
)

func TestConfig(t *testing.T) {
	err := (&Config{User: -1, Image: "a b"}).Validate()
	for _, want := range []string{"listen: missing", "cert_file: missing", "key_file: missing", `image: "a b" has a space`, "user: -1 is negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	good := &Config{Listen: netip.MustParseAddrPort("0.0.0.0:9443"), CertFile: "c", KeyFile: "k", Image: "i"}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	if err := run(context.Background(), []string{"run", "--config", filepath.Join(t.TempDir(), "none.yaml")}, io.Discard, io.Discard); daemon.Code(err) != daemon.Usage {
		t.Errorf("%v has the code %d", err, daemon.Code(err))
	}
}
