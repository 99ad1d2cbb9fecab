package main

import (
	"encoding/pem"
	"path/filepath"
	"testing"

	"sallyport/internal/egress"
	"sallyport/internal/meshtest"
)

// TestWorkloadsTrustNobodyForAllNames takes what a gateway stands in by, and no
// authority of another kind.
func TestWorkloadsTrustNobodyForAllNames(t *testing.T) {
	i, err := egress.OpenInspector(filepath.Join(t.TempDir(), "inspection.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Use(meshtest.Snapshot(t, map[string]string{"egress.yaml": "destinations:\n  - {host: shop.test, tls: inspect}\n  - {host: '*.wild.test', tls: inspect}\n"})); err != nil {
		t.Fatal(err)
	}
	if err := constrained(i.PEM()); err != nil {
		t.Error(err)
	}
	other := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: meshtest.NewCA(t, meshtest.TD).Root().Raw})
	for name, text := range map[string][]byte{"another": other, "another behind it": append(i.PEM(), other...), "none": []byte("none")} {
		if constrained(text) == nil {
			t.Errorf("%s is taken", name)
		}
	}
}
