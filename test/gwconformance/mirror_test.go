package gwconformance

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// The tests of mirrors read in the logs of pods which requests have come. Each
// backend writes such a log, and the tests get it from what looks like a cluster.

// pods are what the tests look for the logs by.
func pods() (out []client.Object) {
	for _, b := range backends {
		out = append(out, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: b.pod(), Namespace: b.namespace, Labels: map[string]string{"app": b.name}}})
	}
	return out
}

// logs is a cluster of which nothing is there but the logs of pods.
func (w *world) logs(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/namespaces/{namespace}/pods/{pod}/log", func(rw http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(w.path(r.PathValue("pod")))
		if err != nil {
			http.Error(rw, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = rw.Write(b) // who asks sees what is missing
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	c, err := kubernetes.NewForConfig(&rest.Config{Host: s.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tell writes down a request as the tests look for it.
func (b backend) tell(r *http.Request) {
	fmt.Fprintf(b.log, "Echoing back request made to %s to client (%s)\n", r.RequestURI, r.RemoteAddr)
}
