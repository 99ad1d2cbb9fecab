package gwconformance

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// object is a part of a document.
type object = map[string]any

// use imports the routes of a test, as an operator would, as routes of the
// service that plays the Gateway, and waits until every proxy acts on them. What
// none matches is not found, which is what a Gateway answers.
func (w *world) use(t *testing.T, k *cluster) {
	t.Helper()
	file := w.path("routes.yaml")
	if err := os.WriteFile(file, k.routes.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := w.sallyport("route", "import", file, "--service", gateway)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("imported:\n%s", b)
	var of struct {
		Service string `json:"service"`
		Routes  []any  `json:"routes"`
	}
	if err := yaml.UnmarshalStrict(b, &of); err != nil {
		t.Fatal(err)
	}
	w.revision++
	of.Routes = append(of.Routes, object{"name": "none", "respond": object{"status": 404}},
		object{"name": "revision", "matches": []object{{"path": object{"exact": revisionPath}}}, "respond": object{"status": 200, "body": strconv.Itoa(w.revision)}})
	if b, err = json.Marshal(of); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.path("policies", "routes", "gateway.yaml"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	w.inForce(t)
}

// inForce waits until the Gateway's sidecar answers by the newest routes.
func (w *world) inForce(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + gatewayIP + revisionPath)
		if err != nil {
			continue
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && string(b) == strconv.Itoa(w.revision) {
			return
		}
	}
	out, err := w.sallyport("policy", "status")
	t.Fatalf("the routes did not come into force: %v\n%s", err, out)
}

// revisionPath is where the Gateway says which routes are in force.
const revisionPath = "/-/revision"
