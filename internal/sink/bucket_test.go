package sink

import (
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

func TestBucketTakesFiles(t *testing.T) {
	mem := s3mem.New()
	if err := mem.CreateBucket("shadow"); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(gofakes3.New(mem).Server())
	t.Cleanup(srv.Close)
	t.Setenv("SP_TEST_S3", "key")
	b, err := OpenBucket(&S3Config{Endpoint: srv.URL, Bucket: "shadow", Prefix: "a/b", AccessKey: Secret{Env: "SP_TEST_S3"}, SecretKey: Secret{Env: "SP_TEST_S3"}}, Env{})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("of a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, tt := range []struct {
		r    io.Reader
		want string
	}{{f, "of a file"}, {strings.NewReader("of memory"), "of memory"}} {
		if err := b.Put(t.Context(), "payments/x", tt.r, 9); err != nil {
			t.Fatal(err)
		}
		o, err := mem.GetObject("shadow", "a/b/payments/x", nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(o.Contents); string(got) != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
	if err := b.Put(t.Context(), "x", strings.NewReader("short"), 9); err == nil {
		t.Error("a file that is shorter than it says is taken")
	}
}
